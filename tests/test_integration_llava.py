"""The tower in a stand-in for LLaVA's interface.

test_llava_original.py runs the real repository.
"""

import sys

import pytest
import torch
import yaml
from llava_standin import BUILDER, OwnTower, install, model_args, model_config
from PIL import Image
from torch import nn
from torch.nn.modules import module as torch_module
from tower_parts import GRID, IMAGE, expert_entries, open_output, pixels, save_clip, text_config
from transformers import CLIPVisionConfig, CLIPVisionModel

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.integrations.llava import ToveVisionTower, register
from tove_llava.integrations.llava import tower as module
from tove_llava.integrations.llava.balanced_loss import BalancedLoss
from tove_llava.llava import ToveLlavaConfig, ToveLlavaForConditionalGeneration
from tove_llava.tower import ToveVisionConfig, ToveVisionModel

PROJECTORS = ["mlp2x_gelu", "linear", "identity"]


@pytest.fixture
def llava(monkeypatch):
    """The stand-in with our tower registered: (builder, arch, model class)."""
    before = dict(torch_module._global_module_registration_hooks)
    parts = install(monkeypatch)
    register()
    yield parts
    torch_module._global_module_registration_hooks.clear()
    torch_module._global_module_registration_hooks.update(before)


def write_preset(folder, file="preset.yaml", **vision):
    """Write a preset over dummy experts and a random CLIP, written once."""
    if not (folder / "clip").exists():
        save_clip(folder / "clip")
        entries = expert_entries(folder, ("depth", "edge"))
        (folder / "experts.yaml").write_text(yaml.safe_dump([entry.to_dict() for entry in entries]))
    entries, keys = yaml.safe_load((folder / "experts.yaml").read_text()), ("name", "expert", "source", "options")
    experts = [{key: value for key, value in entry.items() if key in keys} for entry in entries]
    vision = {"clip": f"hf:{folder / 'clip'}", "projection_dim": 10, "experts": experts, **vision}
    preset = {"vision": vision, "language": {"source": "hf:./none"}, "stages": {}}
    (folder / file).write_text(yaml.safe_dump(preset))
    return f"tove:{folder / file}"


def make_model(llava, name, *, config=None, in_list=False, **args):
    """Make LLaVA's model as its training code does."""
    model = llava[2](config or model_config())
    model.model.initialize_vision_modules(model_args(name, **args), in_list=in_list)
    return model


def open_tower(model, seed=0):
    """Give the trained parts values as after training."""
    torch.manual_seed(seed)
    tower = model.get_vision_tower().tower
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return tower


def batch(images=2, seed=0):
    ids = torch.randint(3, 60, (images, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "images": pixels(images)}


def adapter_state(model):
    """Return stage 1's saved parameters, those with ``mm_projector`` in their names."""
    return {k: v.detach().clone() for k, v in model.named_parameters() if "mm_projector" in k}


def save_adapter(state, folder):
    torch.save(state, folder / "mm_projector.bin")
    return str(folder / "mm_projector.bin")


def align(model):
    """Freeze the model as LLaVA's stage 1 does."""
    model.requires_grad_(False)
    for parameter in model.model.mm_projector.parameters():
        parameter.requires_grad = True


def test_names_of_others_go_to_the_original_function(llava, tmp_path):
    builder, arch, _ = llava
    before = builder.build_vision_tower
    register()
    assert builder.build_vision_tower is before, "a second call changes nothing"
    assert not isinstance(make_model(llava, write_preset(tmp_path)).loss_function.language, BalancedLoss)
    assert isinstance(builder.build_vision_tower(model_args("openai/clip-vit-large-patch14-336")), OwnTower)
    assert arch.build_vision_tower is builder.build_vision_tower
    assert builder.build_vision_tower.__doc__ == "Builds LLaVA's own."
    assert isinstance(builder.build_vision_tower(model_args(write_preset(tmp_path))), ToveVisionTower)


def test_without_llava_or_with_another_package_of_that_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "llava", None)
    with pytest.raises(ConfigError, match="put the folder of haotian-liu/LLaVA on PYTHONPATH"):
        register()
    builder, *_ = install(monkeypatch)
    del builder.build_vision_tower
    with pytest.raises(ConfigError, match=f"{BUILDER} has no build_vision_tower"):
        register()


def test_a_preset_of_the_package_is_named_by_its_name(llava):
    tower = llava[0].build_vision_tower(model_args("tove:tiny"), delay_load=True)
    assert tower.config.expert_names == ["depth", "normal", "edge", "segmentation"] and not tower.is_loaded


UNKNOWN = {
    "tove:tinny": r"no such preset; there are .*tiny.*tove:\./tinny",
    "tove:./nowhere": "no nowhere/config.json",
    "tove:nowhere/preset.yaml": "nowhere/preset.yaml does not exist",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_name_is_refused(llava, name):
    with pytest.raises((ConfigError, CheckpointError), match=UNKNOWN[name]):
        llava[0].build_vision_tower(model_args(name))


def tower_of(folder):
    config = ToveVisionConfig.from_sources(save_clip(folder / "clip"), expert_entries(folder), projection_dim=10)
    return ToveVisionModel(config)


@pytest.mark.parametrize("kind", ["tower", "llava"])
def test_a_checkpoint_folder_brings_its_trained_parts(llava, tmp_path, monkeypatch, kind):
    saved = tower = tower_of(tmp_path)
    if kind == "llava":
        keys = {"image_token_index": 63, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        llava_config = ToveLlavaConfig(vision_config=tower.config, text_config=text_config(), **keys)
        saved = ToveLlavaForConditionalGeneration(llava_config)
        tower = saved.tower
    open_output(tower)
    saved.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    built = llava[0].build_vision_tower(model_args("tove:./saved")).eval()
    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), built.tower.parameters(), strict=True))
    assert torch.equal(built(pixels()), tower.load_backbones().eval()(pixels()).last_hidden_state)


def test_a_self_contained_folder_is_found_from_anywhere(llava, tmp_path, monkeypatch):
    tower = tower_of(tmp_path).load_backbones().eval()
    moved = tower.save_backbones(tmp_path / "saved")
    tower.save_pretrained(tmp_path / "saved")
    moved.save_pretrained(tmp_path / "saved")
    (tmp_path / "clip").rename(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    model = make_model(llava, "tove:./saved").eval()
    monkeypatch.chdir("/")
    again = llava[2](type(model.config).from_dict(model.config.to_dict())).eval()
    again.get_vision_tower().load_model()
    expected = tower(pixels()).last_hidden_state
    assert torch.equal(model.get_vision_tower()(pixels()), expected)
    assert torch.equal(again.get_vision_tower()(pixels()), expected)


def test_folders_without_a_fitting_tower_are_refused(llava, tmp_path):
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    CLIPVisionModel(config).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="without a ToVE tower"):
        llava[0].build_vision_tower(model_args(f"tove:{tmp_path}/plain"))
    tower = tower_of(tmp_path)
    tower.save_pretrained(tmp_path / "saved")
    tower.config.projection_dim = 12
    tower.config.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="not those of the tower that its config.json describes"):
        llava[0].build_vision_tower(model_args(f"tove:{tmp_path}/saved"))
    weights = tmp_path / "saved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        llava[0].build_vision_tower(model_args(f"tove:{tmp_path}/saved"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mm_vision_select_layer": -1}, "--mm_vision_select_layer -2"),
        ({"mm_vision_select_feature": "cls_patch"}, "--mm_vision_select_feature patch"),
        ({"s2": True}, "S2"),
        ({"unfreeze_mm_vision_tower": True}, "never trained"),
    ],
)
def test_options_that_the_tower_would_have_to_ignore_are_refused(llava, tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        llava[0].build_vision_tower(model_args(write_preset(tmp_path), **options))


def test_the_layer_is_the_towers_counted_from_either_end(llava, tmp_path):
    def build(layer, **keys):
        name = write_preset(tmp_path, **keys)
        return llava[0].build_vision_tower(model_args(name, mm_vision_select_layer=layer))

    by_layer = {}
    for layer, same in ((-2, 2), (-1, 3), (-3, 1)):  # of 3 layers
        towers = [build(number, clip_layer=layer) for number in (layer, same)]
        assert [tower.select_layer for tower in towers] == [layer] * 2
        by_layer[layer], again = (tower.eval()(pixels()) for tower in towers)
        assert torch.equal(by_layer[layer], again)
        with pytest.raises(ConfigError, match="mm_vision_select_layer"):
            build(layer - 1, clip_layer=layer)
    assert not any(torch.equal(by_layer[-2], by_layer[other]) for other in (-1, -3))


@pytest.mark.parametrize("delay_load", [False, True])
def test_a_tower_answers_what_is_asked_of_it(llava, tmp_path, delay_load):
    tower = llava[0].build_vision_tower(model_args(write_preset(tmp_path)), delay_load=delay_load)
    for _ in range(2):
        assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (16, GRID**2, GRID)
        assert (tower.config.image_size, tower.config.patch_size) == (IMAGE, IMAGE // GRID)
        assert (tower.select_layer, tower.select_feature) == (-2, "patch")
        assert tower.vision_tower_name == f"tove:{tmp_path}/preset.yaml"
        assert tower.dummy_feature.shape == (1, 16) and tower.dummy_feature.dtype == tower.dtype == torch.float32
        assert tower.device == torch.device("cpu")
        processor = tower.image_processor
        assert processor.crop_size["height"] == processor.size["shortest_edge"] == IMAGE
        image = Image.new("RGB", (50, 40), tuple(int(x * 255) for x in processor.image_mean))
        assert processor.preprocess(image, return_tensors="pt")["pixel_values"][0].abs().max() < 0.02
        assert processor([image], return_tensors="pt")["pixel_values"].shape == (1, 3, IMAGE, IMAGE)
        assert tower.is_loaded is not delay_load
        if delay_load:
            with pytest.raises(CheckpointError, match=r"call load_model\(\)"):
                tower(pixels())
            tower.load_model(device_map="auto")
            delay_load = False
    together, apart = tower.eval()(pixels(3)), tower(list(pixels(3)))
    assert together.shape == (3, GRID**2, 16)
    assert [x.shape for x in apart] == [(1, GRID**2, 16)] * 3 and torch.equal(torch.cat(apart), together)


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", torch.device("cpu"), {"": "cpu"}, {"vision_tower": "cpu"}])
def test_load_model_takes_every_kind_of_device_map(llava, tmp_path, device_map):
    tower = llava[0].build_vision_tower(model_args(write_preset(tmp_path)), delay_load=True)
    with pytest.raises(ConfigError, match=r"add 'model\.vision_tower'"):
        tower.load_model(device_map={"model.layers.0": 0})
    tower.load_model(device_map=device_map)
    clip = tower.tower.frozen.clip
    tower.load_model()
    assert tower.is_loaded and tower.tower.frozen.clip is clip
    if device_map != "auto":
        assert tower.device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_llava_casts_the_backbones_and_not_what_is_trained(llava, tmp_path, dtype):
    model = make_model(llava, write_preset(tmp_path)).eval()
    open_tower(model)
    tower = model.get_vision_tower()
    reference = tower(pixels())
    tower.to(dtype=dtype, device="cpu")
    assert tower.dtype == dtype == next(tower.tower.frozen.hub.parameters()).dtype
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    features = tower(pixels())
    assert features.dtype == torch.float32
    assert 0 < (features - reference).abs().max() < 0.1 * reference.abs().max()
    model.to(dtype)
    assert tower(pixels().to(dtype)).dtype == dtype


@pytest.mark.parametrize("projector", PROJECTORS)
def test_trained_parts_belong_only_to_the_projector(llava, tmp_path, projector):
    config = model_config(hidden_size=16) if projector == "identity" else None
    model = make_model(llava, write_preset(tmp_path), config=config, mm_projector_type=projector)
    tower = model.get_vision_tower().tower
    names = {name for name, p in model.named_parameters() if any(p is q for q in tower.parameters())}
    assert len(names) == len(list(tower.parameters())) > 5
    assert all(".mm_projector." in name for name in names)
    assert not list(model.get_vision_tower().parameters())
    assert len(model.state_dict()) == len(list(model.named_parameters()))
    # It has no part in the projector's own work.
    x = torch.randn(2, 16)
    assert model.model.mm_projector(x).shape == (2, 16 if projector == "identity" else 24)


def test_the_projector_starts_as_with_llavas_own_tower(llava, tmp_path):
    weights = []
    for name in ("openai/clip-vit-large-patch14-336", write_preset(tmp_path)):
        torch.manual_seed(0)
        llava[0].build_vision_tower(model_args(name))
        weights.append(nn.Linear(16, 24).weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("stage", ["align", "tune"])
def test_trained_parts_train_and_backbones_do_not(llava, tmp_path, stage):
    model = make_model(llava, write_preset(tmp_path)).train()
    tower = open_tower(model)
    if stage == "align":
        align(model)
    model.get_vision_tower().requires_grad_(False)  # as forks do with their towers
    frozen = [p for module in tower.frozen.modules() for p in module.parameters()]
    before = [p.clone() for p in frozen]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batch()).loss.backward()
    missing = [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing
    assert (model.lm_head.weight.grad is None) is (stage == "align")
    optimizer.step()
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(frozen, before, strict=True))
    assert not any(module.training for module in tower.frozen.modules())


def test_the_loss_holds_the_balance_loss_once(llava, tmp_path):
    model = make_model(llava, write_preset(tmp_path, noisy_gating=False, router_aux_loss_coef=0.5)).train()
    open_tower(model)
    tower = model.get_vision_tower()
    loss = model(**batch()).loss
    assert tower.balance_loss() is None  # taken
    expected = tower.tower.balance_loss(tower.tower(batch()["images"]).gate_inputs)
    tower.config.router_aux_loss_coef = 0.0
    language = model(**batch()).loss
    assert expected > 1e-3 and (loss - language).item() == pytest.approx(0.5 * expected.item(), rel=1e-4)
    gradient = torch.autograd.grad(loss - language, tower.tower.fusion.gate.score.weight)[0]
    wanted = torch.autograd.grad(0.5 * expected, tower.tower.fusion.gate.score.weight)[0]
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)


def test_black_images_of_records_without_one_have_no_part_in_it(llava, tmp_path):
    model = make_model(llava, write_preset(tmp_path, noisy_gating=False)).train()
    open_tower(model)
    tower = model.get_vision_tower()
    images = pixels(2)
    tower(images)
    expected = tower.balance_loss().item()
    tower(torch.cat([images[:1], torch.zeros(3, 3, IMAGE, IMAGE), images[1:]]))
    assert tower.balance_loss().item() == pytest.approx(expected, rel=1e-5)
    tower(torch.zeros(2, 3, IMAGE, IMAGE))
    nothing = tower.balance_loss()
    assert nothing == 0
    nothing.backward()
    # Every rank touches the same parameters, also one whose records are all without images.
    assert tower.tower.fusion.gate.score.weight.grad is not None


def test_no_balance_loss_where_nothing_is_trained(llava, tmp_path):
    model = make_model(llava, write_preset(tmp_path)).eval()
    tower = model.get_vision_tower()
    tower(pixels())
    assert tower.balance_loss() is None
    with torch.no_grad():
        model.train()(**batch())
    assert tower.balance_loss() is None
    model = make_model(llava, write_preset(tmp_path, "clip.yaml", fusion="none", experts=[])).train()
    assert model(**batch()).loss.isfinite() and model.get_vision_tower().balance_loss() is None


def test_a_loss_that_is_computed_elsewhere_is_noticed(llava, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(module.logger, "warning_once", said.append)
    model = make_model(llava, write_preset(tmp_path)).train()
    for _ in range(2):
        model(**batch())
    assert not said
    model.loss_function = model.loss_function.language
    for _ in range(2):
        model(**batch())
    assert len(said) == 1 and "balance_loss()" in said[0]


@pytest.mark.parametrize("projector", PROJECTORS)
def test_what_stage_1_saves_loads_again(llava, tmp_path, projector):
    name = write_preset(tmp_path)

    def model(**keys):
        config = model_config(hidden_size=16 if projector == "identity" else 24)
        return make_model(llava, name, config=config, mm_projector_type=projector, **keys).eval()

    first = model()
    open_tower(first)
    second = model(pretrain_mm_mlp_adapter=save_adapter(adapter_state(first), tmp_path))
    assert second.get_vision_tower().tower.fusion.output.weight.abs().sum() > 0
    old, new = adapter_state(first), adapter_state(second)
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert torch.equal(first.get_vision_tower()(pixels()), second.get_vision_tower()(pixels()))


@pytest.mark.parametrize("how", ["none of them", "not all of them", "other experts"])
@pytest.mark.parametrize("delayed", [False, True])
def test_a_file_without_the_trained_parts_is_refused(llava, tmp_path, how, delayed):
    """``delayed``: as LLaVA's loader does it, with strict=False and before load_model."""
    name = write_preset(tmp_path)
    other = make_model(llava, write_preset(tmp_path, "clip.yaml", fusion="none", experts=[]))
    trained = make_model(llava, name)
    if how == "other experts":
        trained, other, name = other, trained, f"tove:{tmp_path / 'clip.yaml'}"
        state = adapter_state(other)
    else:
        state = adapter_state(trained)
        tower = sorted(key for key in state if ".tove." in key)
        for key in tower if how == "none of them" else tower[:1]:
            del state[key]
    with pytest.raises(CheckpointError, match=r"does not hold the trained parts of tove:.*fusion\."):
        if delayed:
            model = llava[2](trained.config)
            model.load_state_dict(state, strict=False)
            model.get_vision_tower().load_model()
        else:
            make_model(llava, name, pretrain_mm_mlp_adapter=save_adapter(state, tmp_path))


def test_a_whole_model_may_come_in_shards(llava, tmp_path):
    first = make_model(llava, write_preset(tmp_path))
    open_tower(first)
    state = list(first.state_dict().items())
    for size in (1, 7):
        second = llava[2](first.config)
        for start in range(0, len(state), size):
            second.load_state_dict(dict(state[start : start + size]), strict=False)
        second.get_vision_tower().load_model()
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_saved_model_is_loaded_as_it_was_trained(llava, tmp_path):
    """A changed preset and taken-out experts do not change the saved model."""
    name = write_preset(tmp_path)
    first = make_model(llava, name).eval()
    open_tower(first).detach_experts(["edge"])
    first.save_pretrained(tmp_path / "saved")
    write_preset(tmp_path, projection_dim=6, null_slot=True)
    second, info = llava[2].from_pretrained(tmp_path / "saved", output_loading_info=True)
    tower = second.eval().get_vision_tower()
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not tower.is_loaded and tower.vision_tower_name == name
    tower.load_model(device_map="auto")
    assert tower.config.detached_experts == ["edge"]
    assert torch.equal(tower.cpu()(pixels()), first.get_vision_tower()(pixels()))
    assert torch.equal(second(**batch()).logits, first(**batch()).logits)


def test_a_new_model_starts_as_clip(llava, tmp_path):
    """Nothing of LLaVA's own initialisation reaches the trained parts, which start closed."""
    first = make_model(llava, write_preset(tmp_path))
    config = type(first.config).from_dict(first.config.to_dict())
    assert llava[2](config).get_vision_tower().tower.fusion.output.weight.abs().sum() == 0
    first.save_pretrained(tmp_path / "saved", state_dict={"lm_head.weight": first.lm_head.weight})
    loaded = llava[2].from_pretrained(tmp_path / "saved")
    assert loaded.get_vision_tower().tower.fusion.output.weight.abs().sum() == 0


def test_stage_2_with_another_tower_of_the_same_shapes_is_refused(llava, tmp_path):
    first = make_model(llava, write_preset(tmp_path))
    first.config.save_pretrained(tmp_path)
    adapter = {"pretrain_mm_mlp_adapter": save_adapter(adapter_state(first), tmp_path)}
    make_model(llava, write_preset(tmp_path, "balanced.yaml", router_aux_loss_coef=0.1), **adapter)
    with pytest.raises(CheckpointError, match="they differ in top_k. Name the tower"):
        make_model(llava, write_preset(tmp_path, "sparse.yaml", top_k=1), **adapter)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="config.json, line 1: not valid JSON"):
        make_model(llava, write_preset(tmp_path), **adapter)


def test_fsdp_is_refused(llava, tmp_path):
    with pytest.raises(ConfigError, match="FSDP"):
        make_model(llava, write_preset(tmp_path), in_list=True)
