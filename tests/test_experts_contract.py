"""Every expert keeps the contract, on the real architecture of its library."""

import pytest
import torch
from experts_zoo import CASES
from safetensors.torch import load_file, save_file
from torch import nn

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.sources import Source
from tove_llava.experts import EXPERTS, ExpertHub, build_expert, complete_specs
from tove_llava.experts.dense import DENSE

PIXELS = torch.rand(2, 3, 50, 60, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def load(spec):
    expert = build_expert(spec)
    expert.load()
    return expert


@pytest.fixture
def loaded(case, tmp_path):
    return load(case.spec(tmp_path / "source"))


def test_every_registered_expert_and_architecture_is_tried(tmp_path):
    classes, architectures = set(), set()
    for key, case in CASES.items():
        spec = case.spec(tmp_path / key)
        classes.add(EXPERTS.get(case.expert)[Source.parse(spec["source"]).scheme])
        architectures.add(type(getattr(build_expert(spec), "architecture", None)))
    registered = {cls for name in EXPERTS for cls in EXPERTS.get(name).values()}
    # Other tests of this process may have registered their experts.
    untried = {cls.__name__ for cls in registered - classes if cls.__module__.startswith("tove_llava.")}
    assert untried == {"DexiNedEdge"}  # cannot be made small: it has a separate test below
    assert {DENSE.get(name) for name in DENSE} - architectures == {DENSE.get("DPTModel")}  # saved by the hub only


def test_declared_shape_is_the_real_one(case, tmp_path):
    expert = build_expert(case.spec(tmp_path / "source"))
    assert (expert.spec.width, expert.spec.grid) == (case.width, case.grid)
    assert not expert.is_loaded and not list(expert.parameters())
    with pytest.raises(CheckpointError, match=r"'x' has no weights yet; call load\(\)"):
        expert(PIXELS)
    expert.load()
    out = expert(PIXELS)
    assert out.shape == (2, case.width, *case.grid)
    assert torch.isfinite(out).all()
    assert not torch.equal(out[0], out[1])  # it looks at the image


def test_frozen_whatever_the_mode(loaded):
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    first = loaded(PIXELS)
    loaded.train().requires_grad_(True)
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = loaded(PIXELS.clone().requires_grad_(True))
    assert not again.requires_grad and not again.is_inference()
    assert torch.equal(first, again)
    after = loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_saved_by_value_and_read_back(loaded, tmp_path):
    hub = ExpertHub([loaded.spec])
    hub.load()
    specs = hub.save(tmp_path / "checkpoint")
    assert specs[0].source.split(":")[-1].startswith("./experts/x")
    moved = (tmp_path / "checkpoint").rename(tmp_path / "elsewhere")
    again = ExpertHub([spec.to_dict() for spec in specs], base_dir=moved)
    again.load()
    assert torch.equal(again["x"](PIXELS), loaded(PIXELS))
    assert not list(moved.rglob("*.bin")) and not list(moved.rglob("*.pt*"))


def test_bfloat16(case, tmp_path):
    expert = build_expert(case.spec(tmp_path / "source")).to(torch.bfloat16)  # before the weights are there
    expert.load()
    assert {parameter.dtype for parameter in expert.parameters()} == {torch.bfloat16}
    out = expert(PIXELS.to(torch.bfloat16))  # antialiased interpolation has no bf16 kernel on the CPU
    assert out.dtype == torch.bfloat16 and torch.isfinite(out.float()).all()


def test_recorded_shape_needs_no_source(case, tmp_path):
    spec = complete_specs([case.spec(tmp_path / "source")])[0].to_dict()
    away = {**spec, "source": spec["source"].replace("source", "gone")}
    expert = build_expert(away)
    assert expert.spec.width == case.width
    with pytest.raises(CheckpointError, match="gone"):
        expert.load()


def calls(expert):
    """List the modules that one forward pass runs."""
    seen = set()
    for name, module in expert.backbone.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    expert(PIXELS)
    return seen


@pytest.mark.parametrize("key", ["eva-timm", "eva-open_clip", "dinov2", "dinov3", "siglip2", "sam"])
def test_blocks_after_the_layer_are_not_run(key, tmp_path):
    spec = CASES[key].spec(tmp_path)
    ran = {name for name in calls(load({**spec, "options": {"layer": 1}})) if name.startswith("blocks.")}
    assert {name for name in ran if name.count(".") == 1} == {"blocks.0", "blocks.1"}
    assert "blocks.2" in calls(load(spec))


@pytest.mark.parametrize(
    "key, decoder",
    [
        *((key, ("neck", "head")) for key in ("depth-dpt", "normal-dpt", "depth-anything")),
        ("depth-segformer", ("decode_head",)),
        ("segmentation-segformer", ("decode_head", "segformer.stages.3", "stages.3")),
        ("segmentation-mask2former", ("model.transformer", "model.pixel_level_module.decoder", "class_predictor")),
    ],
)
def test_features_mode_runs_no_decoder(key, decoder, tmp_path):
    ran = calls(load(CASES[key].spec(tmp_path)))
    assert len(ran) > 3 and not [name for name in ran if name.startswith(decoder)]
    whole = load({**CASES[key].spec(tmp_path), "mode": "map", "options": {}})
    assert [name for name in calls(whole) if name.startswith(decoder)]


def is_depth(out):
    return torch.equal(out.amin((1, 2, 3)), torch.zeros(2)) and torch.allclose(out.amax((1, 2, 3)), torch.ones(2))


def is_normal(out):
    return torch.allclose(out.norm(dim=1), torch.ones(()), atol=1e-5)


def is_distribution(out):
    return (out >= 0).all() and torch.allclose(out.sum(1), torch.ones(()), atol=1e-5)


MAPS = {
    **dict.fromkeys(["depth-dpt-map", "depth-anything-map", "depth-segformer-map"], is_depth),
    **dict.fromkeys(["normal-dpt-map", "normal-segformer-map"], is_normal),
    **dict.fromkeys(["segmentation-segformer-map", "segmentation-mask2former-map"], is_distribution),
    "edge-segformer-map": lambda out: (out > 0).all() and (out < 1).all(),
}


@pytest.mark.parametrize("key", MAPS)
def test_a_map_has_its_meaning(key, tmp_path):
    assert MAPS[key](load(CASES[key].spec(tmp_path))(PIXELS))


def test_relative_depth_fills_the_unit_range_and_metric_depth_keeps_its_own():
    entry = {"name": "depth", "source": "bundled:depth", "mode": "map"}
    relative, metric = (load({**entry, "options": keys})(PIXELS) for keys in ({}, {"relative": False}))
    low, high = metric.amin((1, 2, 3), keepdim=True), metric.amax((1, 2, 3), keepdim=True)
    assert is_depth(relative) and torch.allclose((metric - low) / (high - low), relative, atol=1e-5)
    assert not torch.allclose(high, torch.ones_like(high), atol=1e-2)


@pytest.mark.parametrize(
    "key, tokens",
    [
        ("depth-anything", lambda model, x: model.backbone(x).feature_maps[-1][:, 1:]),
        ("depth-dpt", lambda model, x: model.dpt(x).last_hidden_state[:, 1:]),
        (
            "segmentation-segformer",
            lambda model, x: model.segformer(x, output_hidden_states=True).hidden_states[2].flatten(2).transpose(1, 2),
        ),
    ],
)
def test_tokens_are_those_of_the_whole_model(key, tokens, tmp_path):
    spec = CASES[key].spec(tmp_path)
    expert, whole = load(spec), load({**spec, "mode": "map", "options": {}})
    assert torch.equal(expert(PIXELS).flatten(2).transpose(1, 2), tokens(whole.backbone, whole.condition(PIXELS)))
    if key == "segmentation-segformer":  # later stages are not even held
        assert sum(map(torch.numel, expert.parameters())) < sum(map(torch.numel, whole.backbone.segformer.parameters()))


def test_pixels_are_normalised_as_the_source_says(tmp_path):
    expert = load(CASES["depth-segformer"].spec(tmp_path))
    flat = torch.full((1, 3, 40, 40), 0.5)
    expected = torch.tensor([(0.5 - 0.5) / 0.2, (0.5 - 0.4) / 0.3, (0.5 - 0.3) / 0.4]).view(1, 3, 1, 1)
    assert torch.allclose(expert.condition(flat), expected.expand(1, 3, 96, 96), atol=1e-5)


# It has 35 M parameters and cannot be smaller, so everything about it is in one test.
def test_dexined(tmp_path):
    from kornia.models.dexined import DexiNed

    torch.manual_seed(0)
    file = tmp_path / "dexined.safetensors"
    network = DexiNed(pretrained=False).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # running statistics that batch statistics would visibly differ from
            module.running_mean.uniform_(-0.1, 0.1), module.running_var.uniform_(0.5, 2)
    save_file(network.state_dict(), file)

    spec = {"name": "edge", "source": f"kornia:{file}", "mode": "map", "image_size": 64}
    expert = load(spec)
    assert (expert.spec.width, expert.spec.grid) == (1, (64, 64))
    expert.train()
    pixels = torch.rand(2, 3, 64, 64)
    bgr = pixels.flip(1) * 255 - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(expert(pixels), network(bgr).sigmoid(), atol=1e-4)
    assert torch.allclose(expert(pixels)[:1], expert(pixels[:1]), atol=1e-4)  # no batch statistics
    running = [m.running_mean for m in expert.modules() if isinstance(m, nn.BatchNorm2d)]
    assert running and all(int(m.num_batches_tracked) == 0 for m in expert.modules() if isinstance(m, nn.BatchNorm2d))

    tokens = load({**spec, "mode": "features"})
    assert (tokens.spec.width, tokens.spec.grid) == (256, (4, 4))
    assert not any("up_block" in name or "block_cat" in name for name, _ in tokens.named_parameters())
    blocks = {}
    network.dblock_6.register_forward_hook(lambda *args: blocks.update(last=args[-1][0]))
    with torch.no_grad():
        network(bgr)
    assert torch.allclose(tokens(pixels), blocks["last"], atol=1e-3)
    hub = ExpertHub([tokens.spec])
    hub.load()
    [saved] = hub.save(tmp_path / "checkpoint")
    again = build_expert(saved, base_dir=tmp_path / "checkpoint")
    again.load()
    assert torch.equal(again(pixels), tokens(pixels))


class Payload:
    def __reduce__(self):
        return (print, ("the pickle ran",))


@pytest.mark.parametrize("key", ["dinov2", "depth-segformer", "kornia"])
def test_a_pickle_of_more_than_tensors_is_refused(key, tmp_path, capsys):
    file = tmp_path / "pytorch_model.bin"
    if key == "kornia":
        spec = {"name": "edge", "source": f"kornia:{file}", "image_size": 64, "width": 256, "grid": (4, 4)}
    else:
        spec = CASES[key].spec(tmp_path)
        for weights in tmp_path.rglob("*.safetensors"):
            weights.unlink()
    torch.save({"weight": torch.zeros(1), "payload": Payload()}, file)
    with pytest.raises(CheckpointError, match="could run code. Convert"):
        load(spec)
    assert "the pickle ran" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["dinov2", "eva-open_clip", "depth-segformer"])
def test_a_pickle_next_to_safetensors_is_not_read(key, tmp_path, capsys):
    spec = CASES[key].spec(tmp_path)
    torch.save({"payload": Payload()}, tmp_path / "pytorch_model.bin")
    assert load(spec).is_loaded and "the pickle ran" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["dinov2", "eva-open_clip", "depth-segformer", "depth-anything"])
def test_missing_tensors_are_never_made_up(key, tmp_path):
    spec = CASES[key].spec(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    dropped = next(name for name in sorted(weights) if "norm1.weight" in name or "layer_norm_1.weight" in name)
    del weights[dropped]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="norm"):
        load(spec)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load(spec)


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"name": "dino"}, "unknown expert 'dino'.*'dinov[23]'"),
        ({"name": "eva", "imagesize": 336}, "unknown key 'imagesize'.*'image_size'"),
        ({"source": "hf:x/y"}, "needs a 'name'"),
        ({"name": "eva", "mode": "maps"}, "'maps' is not one of features, map"),
        ({"name": "eva", "mode": "map"}, "no mode 'map'"),
        ({"name": "eva", "options": {"layr": 1}}, "unknown option 'layr'.*layer, norm"),
        ({"name": "edge", "source": "bundled:edge", "mode": "map", "options": {"relative": False}}, "relative"),
        ({"name": "eva", "options": {"layer": 24}}, "layer=24 must be from -24 to 23"),
        ({"name": "eva", "image_size": 0}, "image_size 0 must be a positive"),
        ({"name": "a b"}, "must be one word"),
        (
            {"name": "depth", "source": "timm:vit_large_patch14_dinov2.lvd142m"},
            "begin with hf:.*'expert: timm' reads any",
        ),
        ({"name": "dinov2", "source": "timm:vit_large_patch14_dinov2.nosuchtag"}, "nosuchtag"),
        ({"name": "dinov2", "source": "timm:nosuchmodel.tag"}, "no such model"),
        ({"name": "eva", "source": "open_clip:EVA02-L-14-336/nosuchtag"}, "no such model and tag"),
        ({"name": "eva", "source": "open_clip:ViT-B-32/openai"}, "not a timm model"),
        ({"name": "edge", "source": "kornia:nosuchthing"}, "kornia has no 'nosuchthing'"),
        ({"name": "eva", "source": "open_clip:EVA02-L-14-336/merged2b_s6b_b61k", "revision": "main"}, "no revision"),
        ({"name": "edge", "source": "kornia:dexined", "revision": "main"}, "no revision"),
        ({"name": "any", "source": "timm:convnxt_tiny"}, "no such model 'convnxt_tiny'. Did you mean 'convnext_tiny'"),
        (
            {"name": "any", "source": "timm:convnext_tiny.in12"},
            "no weights 'in12' of .*'in12k'",
        ),
        ({"name": "any", "expert": "dino", "source": "timm:convnext_tiny"}, "unknown expert 'dino'"),
        ({"name": "any", "source": "hf:x/y"}, "unknown expert 'any'"),
        ({"name": "any", "source": "timm:hiera_tiny_224"}, "{norm: false}"),
        ({"name": "any", "source": "timm:twins_pcpvt_small", "image_size": 100}, "Its own size is 224"),
        ("eva", "a mapping with a 'name'"),
    ],
)
def test_wrong_entries(entry, words):
    with pytest.raises(ConfigError, match=words):
        build_expert(entry)


def test_wrong_files(tmp_path):
    with pytest.raises(ConfigError, match="another model than the one this tower was built for"):
        load({**CASES["dinov2"].spec(tmp_path / "dinov2"), "width": 48, "grid": (4, 4)})
    spec = CASES["depth-segformer"].spec(tmp_path)
    config, preprocessor = tmp_path / "config.json", tmp_path / "preprocessor_config.json"
    for text, words in (
        (preprocessor.read_text().replace('"resample": 2', '"resample": 1'), "'resample=1' resizing"),
        (None, r"preprocessor_config.json cannot be loaded .*\(image_mean, image_std, size\)"),
        ("[]", "preprocessor_config.json: a JSON object is needed"),
    ):
        preprocessor.unlink() if text is None else preprocessor.write_text(text)
        with pytest.raises((CheckpointError, ConfigError), match=words):
            build_expert(spec)
    preprocessor.write_text("{}")
    config.write_text(config.read_text().replace("SegformerForSemanticSegmentation", "SegformerForSomething"))
    with pytest.raises(ConfigError, match="unknown dense architecture 'SegformerForSomething'.*Did you mean"):
        build_expert(spec)


def test_specs_are_complete_and_their_names_unique():
    [spec] = complete_specs([{"name": "self", "expert": "dinov2", "options": {"layer": 3}}])
    assert type(spec).from_dict(spec.to_dict()) == spec
    with pytest.raises(ConfigError, match="two experts are called 'a'"):
        complete_specs([{"name": "a", "expert": "dinov2"}, {"name": "a", "expert": "dinov2"}])


@pytest.mark.parametrize(
    "key, changes, words",
    [
        ("depth-segformer", {"options": {"stage": 9}}, "stage=9 must be from -4 to 3"),
        ("depth-dpt", {"options": {"stage": 1}}, "unknown option 'stage'"),
        ("segmentation-segformer-map", {"expert": "normal"}, "gives 6 channels"),
    ],
)
def test_wrong_options_of_an_architecture(key, changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        build_expert({**CASES[key].spec(tmp_path), **changes})
