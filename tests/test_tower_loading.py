"""The tower in one line, from presets, images and every kind of folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from answer_parts import picture
from convert_parts import pixels as clip_pixels
from tower_parts import make_tower, pixels
from transformers import AutoImageProcessor

import tove_llava
from tove_llava import CheckpointError, ConfigError, ToveVisionModel, load_model, load_tower
from tove_llava.checkpoints import assemble
from tove_llava.llava import build

IMAGES = [picture(1, (40, 24)), picture(2, (30, 30)).convert("L")]
KINDS = ("stage1", "lora", "full")


@pytest.fixture
def no_language(monkeypatch):
    """A world in which no language model can be loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("a language model is loaded")

    for module, name in ((build, "load_whole"), (build, "read_language_model"), (assemble, "load_language")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(build.AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.fixture(scope="module")
def towers(kinds):
    """The tower and image processor of each kind, loaded with the whole model."""
    models = {kind: load_model(kinds / kind) for kind in KINDS}
    return {kind: (model.tower, processor.image_processor) for kind, (model, processor) in models.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_gives_its_tower_without_its_language_model(kinds, towers, kind, no_language):
    expected, processor = towers[kind]
    prepared = processor(images=IMAGES, return_tensors="pt")["pixel_values"]
    for tower in (load_tower(kinds / kind), ToveVisionModel.from_pretrained(kinds / kind)):
        assert torch.equal(tower.processor(images=IMAGES, return_tensors="pt")["pixel_values"], prepared)
        assert torch.equal(tower(IMAGES).last_hidden_state, expected(prepared).last_hidden_state)
        assert tower.dtype == expected.dtype and tower.config.expert_names == expected.config.expert_names


def test_options_reach_the_tower(kinds):
    tower, info = ToveVisionModel.from_pretrained(
        kinds / "lora", dtype="bfloat16", detached_experts=["normal"], load_backbones=False, output_loading_info=True
    )
    assert tower.dtype == torch.bfloat16 and tower.active_experts == ["segmentation"]
    assert not tower.is_loaded and not info["missing_keys"]


@pytest.mark.parametrize("layout", ["whole", "projector", "lora", "hf", "tove"])
def test_another_llava_gives_its_clip_without_its_language_model(world, layout, no_language, tmp_path):
    tower, expected = load_tower(getattr(world, layout), dtype="float32"), world.model.clip
    hidden = expected(clip_pixels(), output_hidden_states=True).hidden_states[-2][:, 1:]
    found = tower(pixel_values=clip_pixels())
    torch.testing.assert_close(found.last_hidden_state, hidden.float(), rtol=1e-4, atol=1e-4)
    assert found.routing is None and tower.config.expert_names == []
    tower.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_tower(tmp_path / "saved")(pixel_values=clip_pixels())[0], found[0])


def test_a_saved_tower_keeps_its_image_processor(kinds, tmp_path):
    tower = load_tower(kinds / "full")
    tower.save_pretrained(tmp_path / "saved", self_contained=True)
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    again = load_tower(tmp_path / "moved")
    assert again.processor.do_pad and torch.equal(again(IMAGES).last_hidden_state, tower(IMAGES).last_hidden_state)
    stock = AutoImageProcessor.from_pretrained(tmp_path / "moved", backend="pil")
    assert torch.equal(stock(IMAGES, return_tensors="pt")["pixel_values"], pixels_of(tower))


def pixels_of(tower):
    return tower.processor(IMAGES, return_tensors="pt")["pixel_values"]


def test_a_preset_gives_a_tower_that_names_its_experts():
    null = ["vision.null_slot=true"]
    tower = load_tower("tiny", overrides=null)
    output = tower(IMAGES[0], output_experts=True)
    assert not tower.training and output.routing.shape == (1, 36, 5)
    assert list(output.experts) == list(output.expert_weights) == tower.config.expert_names
    assert output.experts["segmentation"].shape == (1, 6, 24, 24)
    assert torch.equal(output.expert_weights["edge"], output.routing[..., 2])
    assert torch.equal(output[0], ToveVisionModel.from_preset("tiny", overrides=null)(IMAGES[0])[0])
    tower.detach_experts("depth")
    assert list(tower(IMAGES, output_experts=True).expert_weights) == ["normal", "edge", "segmentation"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"uint8.*tower\.processor"),
        (np.zeros((1, 3, 32, 32), np.uint8), r"ndarray of uint8.*tower\.processor"),
        ([np.zeros((32, 32, 3), np.uint8)], r"a list of ndarray.*PIL"),
        ([], "an empty list"),
        ("photo.jpg", "not str; give a PIL image"),
        (torch.zeros(1, 3, 30, 32), r"expected \[images, 3, 32, 32\]"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, given, message):
    tower = make_tower(tmp_path)
    for call in (tower, tower.encode):
        with pytest.raises(ConfigError, match=message):
            call(given)


def test_places_without_a_tower_are_named(kinds, tmp_path):
    for place, message in (
        ("tinny", "Did you mean 'tiny'"),
        ("owner/nothing", "cannot be fetched"),
        (tmp_path / "nowhere", "is no folder, no preset"),
        (tmp_path, "not a complete ToVE-LLaVA checkpoint"),
        (kinds / "clip", "model_type 'clip_vision_model'"),
        (kinds / "llm", "model_type 'llama'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_tower(place)
    with pytest.raises(ConfigError, match="overrides apply to a preset"):
        load_tower(kinds / "full", overrides=["vision.top_k=1"])
    with pytest.raises(ConfigError, match="Did you mean 'vision'|unknown"):
        load_tower("tiny", overrides=["visoin.top_k=1"])


@pytest.mark.parametrize("kind", ["stage1", "full"])
def test_damaged_checkpoints_are_refused(kinds, kind, tmp_path):
    shutil.copytree(kinds / kind, folder := tmp_path / kind)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["projection_dim"] = 12
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_tower(folder)
    (folder / "tove_llava.json").unlink()
    if kind == "stage1":
        with pytest.raises(CheckpointError, match="not a complete"):
            load_tower(folder)


def test_a_loop_of_ones_own_trains_the_fusion(tmp_path):
    torch.manual_seed(0)
    tower = load_tower("tiny").train()
    frozen = [p.clone() for module in tower.frozen.modules() for p in module.parameters()]
    head = torch.nn.Linear(tower.config.hidden_size, 1)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-2)
    pixel_values, wanted = tower.processor(IMAGES, return_tensors="pt")["pixel_values"], torch.tensor([-1.0, 1.0])
    losses = []
    for _ in range(10):
        output = tower(pixel_values=pixel_values)
        task = (head(output.last_hidden_state.mean(1)).squeeze(1) - wanted).square().mean()
        loss = task + tower.config.router_aux_loss_coef * tower.balance_loss(output)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert {name.split(".")[0] for name, _ in tower.named_parameters()} == {"fusion"}
    now = [p for module in tower.frozen.modules() for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(frozen, now, strict=True))
    tower.save_pretrained(tmp_path)
    assert torch.equal(tove_llava.load_tower(tmp_path)(IMAGES)[0], tower.eval()(IMAGES)[0])


def test_pixels_still_come_as_tensors(tmp_path):
    tower = make_tower(tmp_path, opened=True)
    assert torch.equal(tower(pixels()).last_hidden_state, tower(pixel_values=pixels()).last_hidden_state)
