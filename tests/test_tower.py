import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tower_parts import DummyExpert, expert_entries, make_tower, open_output, pixels, save_clip, tower_config
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, CLIPVisionModel

from tove_llava.core.errors import CheckpointError, ConfigError, NonFiniteError
from tove_llava.tower import ToveVisionConfig, ToveVisionModel
from tove_llava.tower.embedding import resample_grid

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def frozen_tensors(tower):
    return [t for module in tower.frozen.modules() for t in (*module.parameters(), *module.buffers())]


def clip_tokens(folder, x, dtype=torch.float32, layer=-2):
    clip = CLIPVisionModel.from_pretrained(folder / "clip", dtype=dtype).eval()
    return clip(x, output_hidden_states=True).hidden_states[layer][:, 1:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [{}, {"top_k": 1}, {"null_slot": True}, {"noisy_gating": False}])
def test_untrained_tower_is_clip(tmp_path, dtype, keys):
    tower = make_tower(tmp_path, **keys).to(dtype)
    x = pixels().to(dtype)
    expected = clip_tokens(tmp_path, x, dtype)
    assert torch.equal(tower(x).last_hidden_state, expected)
    assert torch.equal(tower.train()(x).last_hidden_state, expected)
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tower(x).last_hidden_state, clip_tokens(tmp_path, x))


def test_sixteen_bit_encoders_compute_in_their_own_precision_under_autocast(tmp_path):
    tower, x = make_tower(tmp_path, opened=True).to(torch.bfloat16), pixels()
    expected = tower.encode(x)
    seen = set()
    tower.frozen.clip.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.float16):
        found = tower.encode(x)
    assert seen == {False}
    assert torch.equal(found.base, expected.base)
    assert all(torch.equal(found.experts[name], expected.experts[name]) for name in expected.experts)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_all_experts_detached_is_clip(tmp_path, mode):
    tower = make_tower(tmp_path, opened=True).train(mode == "train")
    x = pixels()
    expected = clip_tokens(tmp_path, x)
    assert not torch.equal(tower(x).last_hidden_state, expected)
    tower.detach_experts(tower.config.expert_names)
    assert torch.equal(tower(x).last_hidden_state, expected)


def test_a_detached_expert_is_as_good_as_absent(tmp_path):
    whole = make_tower(tmp_path, opened=True)
    keys = whole.config.to_dict()
    keys["experts"] = [entry for entry in keys["experts"] if entry["name"] != "edge"]
    without = ToveVisionModel(ToveVisionConfig.from_dict(keys)).load_backbones().eval()
    state = {k: v for k, v in whole.fusion.state_dict().items() if ".edge." not in k}
    for key in ("gate.score.weight", "gate.noise.weight"):
        state[key] = state[key][[0, 2]]
    without.fusion.load_state_dict(state)
    whole.detach_experts("edge")
    expected, actual = whole(pixels()), without(pixels())
    assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(actual.routing, expected.routing[..., [0, 2]])
    assert torch.equal(expected.routing[..., 1], torch.zeros_like(expected.routing[..., 1]))


def test_a_detached_expert_is_not_computed_until_it_is_attached_and_loaded_again(tmp_path):
    tower = make_tower(tmp_path, opened=True)
    x = pixels()
    before = tower(x).last_hidden_state
    DummyExpert.calls = 0
    tower.detach_experts(["depth", "edge"])
    one_left = tower(x)
    assert DummyExpert.calls == 1
    assert torch.equal(one_left.routing[..., 2], torch.ones_like(one_left.routing[..., 2]))
    tower.attach_experts(["edge", "depth"])
    assert torch.equal(tower(x).last_hidden_state, before)
    tower.detach_experts("edge", free=True)
    assert sum(p.numel() for p in tower.frozen.hub["edge"].parameters()) == 0
    tower(x)
    with pytest.raises(CheckpointError, match=r"load_backbones\(\['edge'\]\)"):
        tower.attach_experts("edge")
    tower.load_backbones(["edge"]).attach_experts("edge")
    assert torch.equal(tower(x).last_hidden_state, before)


def test_fusion_none_is_clip_and_loads_no_expert(tmp_path):
    tower = make_tower(tmp_path, fusion="none")
    DummyExpert.calls = 0
    x = pixels()
    out = tower(x)
    assert torch.equal(out.last_hidden_state, clip_tokens(tmp_path, x)) and out.routing is None
    assert DummyExpert.calls == 0 and not tower.frozen.hub.is_loaded(["depth"])
    assert list(tower.parameters()) == [] and tower.balance_loss(out.gate_inputs) is None
    assert tower.to(torch.bfloat16).frozen.clip.dtype == torch.bfloat16


def frozen_modules(tower):
    return [m for backbone in tower.frozen.modules() for m in backbone.modules()]


def test_frozen_parts_are_out_of_reach(tmp_path):
    peft = pytest.importorskip("peft")
    tower = make_tower(tmp_path, opened=True)
    before = set(map(id, frozen_modules(tower)))
    assert before.isdisjoint(map(id, tower.modules()))
    assert {id(t) for t in frozen_tensors(tower)}.isdisjoint(map(id, (*tower.parameters(), *tower.buffers())))
    assert {key.split(".")[0] for key in tower.state_dict()} == {"fusion"}
    tower.train().requires_grad_(True)
    assert not any(m.training for m in frozen_modules(tower))
    assert not any(t.requires_grad for t in frozen_tensors(tower))
    peft.get_peft_model(tower, peft.LoraConfig(target_modules="all-linear", r=2))
    assert set(map(id, frozen_modules(tower))) == before


def test_training_leaves_frozen_parts_untouched_and_without_autograd(tmp_path):
    tower = make_tower(tmp_path, opened=True).train()
    before = [t.clone() for t in frozen_tensors(tower)]
    features = tower.encode(pixels())
    assert not features.base.requires_grad and not any(f.requires_grad for f in features.experts.values())
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.1)
    tower(pixels()).last_hidden_state.square().sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, frozen_tensors(tower), strict=True))
    assert all(t.grad is None for t in frozen_tensors(tower))


def test_gate_learns_only_once_the_output_layer_has_left_zero(tmp_path):
    tower = make_tower(tmp_path).train()
    target = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))

    def gradients():
        tower.zero_grad()
        (tower(pixels()).last_hidden_state * target).sum().backward()
        return {name: p.grad.abs().sum().item() for name, p in tower.fusion.named_parameters()}

    at_start = gradients()
    assert {name for name, grad in at_start.items() if grad > 0} == {"output.weight"}
    open_output(tower)
    assert all(grad > 0 for grad in gradients().values())


@pytest.mark.parametrize("keys", [{}, {"top_k": 1}, {"top_k": 2, "null_slot": True}, {"noisy_gating": False}])
def test_every_step_touches_every_trainable_parameter(tmp_path, keys):
    tower = make_tower(tmp_path, opened=True, **keys).train()
    if "top_k" in keys:  # nobody chooses the second expert
        with torch.no_grad():
            tower.fusion.gate.norm.bias.fill_(1.0)
            tower.fusion.gate.score.weight[1] = -100.0
    tower.detach_experts("depth")
    tower(pixels()).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in tower.parameters())


@pytest.mark.parametrize("layer, built", [(-2, 2), (-1, 3), (-3, 1), (1, 1), (3, 3)])
def test_no_layer_above_the_tokens_is_built_or_run(tmp_path, layer, built):
    tower = make_tower(tmp_path, clip_layer=layer)
    calls = []
    for index, block in enumerate(tower.frozen.clip.encoder.layers):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    x = pixels()
    assert torch.equal(tower(x).last_hidden_state, clip_tokens(tmp_path, x, layer=layer))
    assert calls == list(range(built)) and len(tower.frozen.clip.encoder.layers) == built
    assert isinstance(tower.frozen.clip.post_layernorm, torch.nn.Identity)


def test_backbones_follow_moves_before_and_after_loading(tmp_path):
    tower = ToveVisionModel(tower_config(tmp_path)).to(torch.bfloat16).load_backbones()
    assert tower.frozen.clip.dtype == torch.bfloat16 and tower.frozen.hub["edge"].dtype == torch.bfloat16
    assert next(tower.frozen.hub["edge"].parameters()).dtype == torch.bfloat16
    tower.to(torch.float32)
    assert next(tower.frozen.hub["edge"].parameters()).dtype == tower.frozen.clip.dtype == torch.float32
    assert tower(pixels()).last_hidden_state.dtype == torch.float32


def test_unloaded_tower_refuses_and_names_the_remedy(tmp_path):
    tower = ToveVisionModel(tower_config(tmp_path))
    assert not tower.is_loaded
    for refused in (lambda: tower(pixels()), lambda: tower.save_backbones(tmp_path / "saved")):
        with pytest.raises(CheckpointError, match="load_backbones"):
            refused()
    with torch.device("meta"):
        on_meta = ToveVisionModel(tower.config)
    with pytest.raises(CheckpointError, match="meta"):
        on_meta.load_backbones()


def test_zero3_does_not_partition_backbones(tmp_path):
    pytest.importorskip("deepspeed")
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    config = tower_config(tmp_path)
    tower = ToveVisionModel(config)
    active = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert active.is_zero3() and is_deepspeed_zero3_enabled()
    tower.load_backbones()
    assert is_deepspeed_zero3_enabled()
    assert all(p.numel() > 0 and not hasattr(p, "ds_id") for m in tower.frozen.modules() for p in m.parameters())


def test_larger_input_goes_to_the_experts_and_shrinks_for_clip(tmp_path):
    tower = make_tower(tmp_path, image_size=64)
    assert (tower.config.patch_size, tower.config.num_patches) == (16, 16)
    x = pixels(size=64)
    seen = {}
    tower.frozen.clip.register_forward_pre_hook(lambda _, args: seen.update(clip=args[0]))
    tower.frozen.hub["edge"].register_forward_pre_hook(lambda _, args: seen.update(edge=args[0]))
    assert tower(x).last_hidden_state.shape == (2, 16, 16)
    small = torch.nn.functional.interpolate(x, (32, 32), mode="bicubic", align_corners=False, antialias=True)
    assert torch.equal(seen["clip"], small) and seen["edge"].shape == (2, 3, 64, 64)
    assert seen["edge"].min() >= 0 and seen["edge"].max() <= 1
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (tower.config.image_mean, tower.config.image_std))
    tower((image - mean) / std)
    torch.testing.assert_close(seen["edge"], image, atol=1e-6, rtol=0)  # as it was before the normalisation


def test_features_may_be_computed_once_and_cut(tmp_path):
    tower = make_tower(tmp_path, opened=True)
    x = pixels(4)
    features = tower.encode(x)
    whole = tower(x).last_hidden_state
    assert torch.equal(tower(features=features).last_hidden_state, whole)
    half = tower(features=features.map(lambda t: t[:2])).last_hidden_state
    torch.testing.assert_close(half, whole[:2])
    with pytest.raises(ConfigError, match="exactly one"):
        tower(x, features=features)
    tower.detach_experts("edge")
    partial = tower.encode(x)
    tower.attach_experts("edge")
    with pytest.raises(ConfigError, match=r"\['edge'\]"):
        tower(features=partial)


def test_llavas_ways_of_asking_for_hidden_states(tmp_path):
    tower = make_tower(tmp_path)
    for selection in (None, True, False, -1, [-1], 0):
        out = tower(pixels(), output_hidden_states=selection, return_dict=True)
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    for selection in (-2, [-2, -1], 22):
        with pytest.raises(ConfigError, match="clip_layer"):
            tower(pixels(), output_hidden_states=selection)
    with pytest.raises(ConfigError, match=r"\[images, 3, 32, 32\]"):
        tower(pixels(size=64))


def test_nonfinite_expert_is_named_in_training_and_dropped_for_its_image_in_inference(tmp_path):
    options = {name: {"nan_above": 1.0} for name in ("depth", "edge", "normal")}
    all_broken = make_tower(tmp_path / "all", opened=True, expert_options=options)
    white = torch.full((1, 3, 32, 32), 5.0)
    with pytest.warns(RuntimeWarning):
        assert torch.equal(all_broken(white).last_hidden_state, clip_tokens(tmp_path / "all", white))
    options = {"edge": {"nan_above": 1.0}}
    tower = make_tower(tmp_path, opened=True, expert_options=options)
    x = pixels(3)
    x[1] = 5.0  # white: the edge expert breaks only on this image
    with pytest.raises(NonFiniteError, match=r"'edge'.*\[1\]"):
        tower.train()(x)
    tower.eval()
    with pytest.warns(RuntimeWarning, match=r"'edge'.*\[1\]"):
        out = tower(x)
    assert out.last_hidden_state.isfinite().all()
    assert (out.routing[1, :, 1] == 0).all() and (out.routing[[0, 2], :, 1] > 0).all()
    tower.detach_experts("edge")
    torch.testing.assert_close(tower(x).last_hidden_state[1], out.last_hidden_state[1])


@pytest.mark.parametrize("keys", [{}, {"top_k": 1}, {"image_size": 64}])
def test_map_mode_embeds_a_dense_prediction(tmp_path, keys):
    entries = [e.replace(mode="map") if e.name == "depth" else e for e in expert_entries(tmp_path)]
    config = ToveVisionConfig.from_sources(save_clip(tmp_path / "clip"), entries, projection_dim=10, **keys)
    tower = ToveVisionModel(config).load_backbones().train()
    size = keys.get("image_size", 32)
    x = pixels(size=size)
    base = tower.encode(x).base
    assert torch.equal(tower(x).last_hidden_state, base)
    open_output(tower)
    out = tower(x).last_hidden_state
    assert out.shape == (2, 16, 16) and not torch.equal(out, base)
    tower.detach_experts("depth")
    tower(x).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in tower.parameters())


@settings(max_examples=25, deadline=None)
@given(h=st.integers(1, 12), w=st.integers(1, 12), size=st.integers(1, 9), value=st.floats(-5, 5, width=32))
def test_resampling_keeps_constants_and_the_right_size(h, w, size, value):
    out = resample_grid(torch.full((1, 2, h, w), value), size)
    assert out.shape == (1, 2, size, size)
    torch.testing.assert_close(out, torch.full_like(out, value))
    noise = torch.randn(1, 2, size, size)
    assert resample_grid(noise, size) is noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", range(4))
def test_shrinking_is_antialiased(dtype, first):
    """Every fourth column is 4: whichever it is, a quarter of the image has that value, and its mean is 1."""
    stripes = torch.zeros(1, 1, 16, 16, dtype=dtype)
    stripes[..., first::4] = 4
    small = resample_grid(stripes, 4)
    assert small.dtype == dtype
    torch.testing.assert_close(small, torch.ones_like(small), rtol=0, atol=0.3)


@pytest.mark.parametrize("keys", [{}, {"top_k": 2}, {"null_slot": True}])
def test_saved_is_loaded_and_saved_keys_are_trainable_keys(tmp_path, keys):
    tower = make_tower(tmp_path / "parts", opened=True, **keys)
    tower.detach_experts("depth")
    tower.save_pretrained(tmp_path / "saved")
    trainable = {name for name, p in tower.named_parameters() if p.requires_grad}
    assert {key for file in (tmp_path / "saved").glob("*.safetensors") for key in load_file(file)} == trainable
    for loaded in (ToveVisionModel.from_pretrained(tmp_path / "saved"), AutoModel.from_pretrained(tmp_path / "saved")):
        assert isinstance(loaded, ToveVisionModel)
        assert torch.equal(loaded(pixels()).last_hidden_state, tower(pixels()).last_hidden_state)
        assert loaded.config.detached_experts == tower.config.detached_experts
        assert loaded.config.to_dict()["experts"] == tower.config.to_dict()["experts"]


def test_missing_trainable_weights_start_closed_not_random(tmp_path):
    tower = make_tower(tmp_path / "parts", opened=True)
    state = {k: v for k, v in tower.state_dict().items() if "output" not in k and "noise" not in k}
    tower.save_pretrained(tmp_path / "saved", state_dict=state)
    loaded = ToveVisionModel.from_pretrained(tmp_path / "saved", load_backbones=False)
    assert loaded.fusion.output.weight.abs().sum() == 0 and loaded.fusion.gate.noise.weight.abs().sum() == 0
    assert torch.equal(loaded.fusion.gate.score.weight, tower.fusion.gate.score.weight)
    assert not loaded.is_loaded


def test_self_contained_folder_can_move(tmp_path):
    tower = make_tower(tmp_path / "parts", opened=True)
    expected = tower(pixels()).last_hidden_state
    tower.save_pretrained(tmp_path / "saved")
    tower.save_backbones(tmp_path / "saved").save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "parts")
    (tmp_path / "saved").rename(tmp_path / "moved")
    text = (tmp_path / "moved" / "config.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["clip_source"] == "hf:./backbones/clip"
    loaded = ToveVisionModel.from_pretrained(tmp_path / "moved")
    assert torch.equal(loaded(pixels()).last_hidden_state, expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_clip_comes_out_of_a_whole_clip_folder(tmp_path, legacy, caplog):
    torch.manual_seed(0)
    vision = tower_config(tmp_path).clip_config
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    whole = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=8)).eval()
    whole.save_pretrained(tmp_path / "whole")
    if legacy:  # the names under which the published checkpoints hold the vision encoder
        file = tmp_path / "whole" / "model.safetensors"
        tensors = load_file(file)
        assert any(key.startswith("vision_model.encoder.layers.0.") for key in tensors), [*tensors][:5]
        save_file({**tensors, "vision_model.embeddings.position_ids": torch.arange(17)[None]}, file, {"format": "pt"})
    config = ToveVisionConfig.from_sources(f"hf:{tmp_path / 'whole'}", fusion="none")
    assert config.clip_config.hidden_size == 16 and config.num_clip_layers == 2
    caplog.clear()
    tower = ToveVisionModel(config).load_backbones().eval()
    assert "UNEXPECTED" not in caplog.text
    x = pixels()
    expected = whole.vision_model(x, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(tower(x).last_hidden_state, expected)


def test_another_clip_is_refused(tmp_path):
    config = tower_config(tmp_path)
    wide, shallow = save_clip(tmp_path / "wide", width=24), save_clip(tmp_path / "shallow", layers=1)
    for source, words in ((wide, "clip_source|size"), (shallow, "clip_source"), ("hf:/nothing", "nothing")):
        config.clip_source = source
        with pytest.raises(CheckpointError, match=words):
            ToveVisionModel(config).load_backbones()


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("topk", 1, "topk"),
        *((key, value, f"{key}={value}") for key, value in [("top_k", 0), ("top_k", 4), ("projection_dim", 0)]),
        *(("clip_layer", value, f"clip_layer={value}") for value in (-4, 0)),
        ("image_size", 33, "33.*32"),
        ("router_aux_loss_coef", -0.1, "router_aux_loss_coef"),
        ("detached_experts", ["detph"], "detph"),
        ("fusion", "gated", "gated.*tove"),
    ],
)
def test_bad_keys_are_named(tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message):
        make_tower(tmp_path, **{key: value})


def test_configuration_survives_json_and_the_auto_classes(tmp_path):
    config = tower_config(tmp_path / "parts", top_k=2, null_slot=True, detached_experts=["edge"])
    config.save_pretrained(tmp_path / "saved")
    loaded = AutoConfig.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, ToveVisionConfig)
    assert config.to_dict() | {"_name_or_path": ""} == loaded.to_dict() | {"_name_or_path": ""}
    assert [s.width for s in loaded.expert_specs] == [6, 8, 10] and loaded.attached_experts == ["depth", "normal"]
