"""The bundled parts load by ordinary paths, and their cards are true."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPModel, CLIPVisionModel
from transformers import SegformerForSemanticSegmentation as Segformer

from tove_llava.core.sources import Source
from tove_llava.data import load_tokenizer
from tove_llava.experts import ExpertSpec, build_expert
from tove_llava.scenes import render, sample_scene
from tove_llava.tower import ToveVisionConfig, ToveVisionModel

sys.path.insert(0, str(Path(__file__).parents[1] / "playground"))

import train_clip  # noqa: E402
import train_expert  # noqa: E402
import train_language  # noqa: E402

BUNDLED = Path(Source.parse("bundled:clip").require()).parent
CHANNELS = {"depth": 1, "normal": 3, "edge": 1, "segmentation": 6}
VISION = ("clip", *CHANNELS)
# The card's first metric, whether less is better, how far 48 scenes may be from its 500, and what is good.
HEADLINE = {
    "depth": ("abs_rel", True, 0.06, 0.2),
    "normal": ("mean_degrees", True, 3.0, 12.0),
    "edge": ("f1", False, 0.03, 0.9),
    "segmentation": ("miou", False, 0.10, 0.7),
}


def card_metric(part, key):
    (value,) = re.findall(rf"^\| {key} \| ([0-9.]+) \|$", (BUNDLED / part / "README.md").read_text(), re.MULTILINE)
    return float(value)


@pytest.fixture(scope="module")
def views():
    """[4,3,96,96] in 0..1."""
    images = [render(sample_scene(0, "val", i), 96).image for i in range(4)]
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in images])


def test_everything_bundled_is_smaller_than_25_mb():
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()) < 25e6


@pytest.mark.parametrize("part", VISION)
def test_a_part_has_a_card_and_finite_half_precision_weights(part):
    card = (BUNDLED / part / "README.md").read_text()
    assert all(words in card for words in ("license: apache-2.0", f"tove_llava/bundled/{part}", "| metric | value |"))
    for key, tensor in load_file(BUNDLED / part / "model.safetensors").items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float16 and tensor.isfinite().all(), key


@pytest.mark.parametrize("task", CHANNELS)
def test_an_expert_gives_maps_and_features_through_the_hub(task, views):
    maps = build_expert(ExpertSpec(name=task, source=f"bundled:{task}", mode="map"))
    assert (maps.image_size, maps.spec.width, maps.spec.grid) == (96, CHANNELS[task], (24, 24))
    maps.load()
    found = maps(views)
    assert found.shape == (4, CHANNELS[task], 24, 24) and found.isfinite().all()
    assert found.flatten(1).std(dim=1).min() > 0.01  # not a constant
    features = build_expert(ExpertSpec(name=task, source=f"bundled:{task}"))
    features.load()
    assert features(views).shape == (4, features.spec.width, *features.spec.grid)


@pytest.mark.parametrize("task", CHANNELS)
def test_an_experts_metric_can_be_had_again(task):
    key, less_is_better, tolerance, good = HEADLINE[task]
    model = Segformer.from_pretrained(BUNDLED / task, dtype=torch.float32)
    measured = train_expert.evaluate(model, task, 48, seed=0)[key]
    said = card_metric(task, key)
    assert measured < min(said + tolerance, good) if less_is_better else measured > max(said - tolerance, good)
    if task == "depth":
        assert said < 0.5 * card_metric("depth", "abs_rel_of_constant")


def test_clip_retrieves_the_captions_of_unseen_scenes():
    model = CLIPModel.from_pretrained(BUNDLED / "clip", dtype=torch.float32)
    metric = train_clip.evaluate(model, AutoTokenizer.from_pretrained(BUNDLED / "clip"), 100, seed=0)
    for direction in ("image_to_text", "text_to_image"):
        key = f"{direction}_r1_of_100"
        assert metric[key] > card_metric("clip", key) - 0.15
        assert metric[key] > 0.05  # chance is 0.01
    assert metric["probe_colour"] > 0.9
    # Where a patch is can be read from its token: without that no LLaVA on top could place anything.
    assert metric["probe_column"] > 0.8 and metric["probe_row"] > 0.8


def test_rescaled_tokens_have_variance_one_and_the_model_computes_what_it_did(views):
    model = CLIPModel.from_pretrained(BUNDLED / "clip", dtype=torch.float32).eval()
    images = (views.permute(0, 2, 3, 1) * 255).byte().numpy()
    pixels = train_clip.normalised(images, "cpu")
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels).pooler_output
        for part in (model.vision_model.pre_layrnorm, *model.vision_model.encoder.layers):
            for linear in (part,) if isinstance(part, torch.nn.LayerNorm) else (part.self_attn.out_proj, part.mlp.fc2):
                linear.weight.mul_(7.0)
                linear.bias.mul_(7.0)
        train_clip.rescale_tokens(model, images, "cpu")
        hidden = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        found = model.get_image_features(pixel_values=pixels).pooler_output
    assert hidden.flatten(0, 1).var(dim=0).mean().item() == pytest.approx(1.0, rel=1e-3)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_the_language_model_answers_about_scenes_written_out_and_as_word_grids():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / "llm", dtype=torch.float32)
    tokenizer = load_tokenizer(BUNDLED / "llm")
    words = train_language.grid_tokens(tokenizer)
    found = train_language.evaluate(model, model.model, tokenizer, words, "cpu", scenes=24)
    for kind in ("existence", "colour", "shape", "above_below", "front_behind", "distance", "place"):
        for manner in ("text", "grid"):
            assert found[f"{manner}/{kind}"] > 0.75, (manner, kind)


def test_clip_loads_without_its_last_layer():
    kept = CLIPVisionModel.from_pretrained(BUNDLED / "clip", num_hidden_layers=5, dtype=torch.float32).eval()
    whole = CLIPVisionModel.from_pretrained(BUNDLED / "clip", dtype=torch.float32).eval()
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(kept(pixels).last_hidden_state, expected)


def test_the_tiny_tower_runs_on_bundled_parts_only(views):
    entries = [{"name": task, "source": f"bundled:{task}", "mode": "map"} for task in CHANNELS]
    tower = ToveVisionModel(ToveVisionConfig.from_sources("bundled:clip", entries)).load_backbones().eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (train_clip.MEAN, train_clip.STD))
    with torch.no_grad():
        out = tower((views - mean) / std)
        base = tower.encode((views - mean) / std).base
    assert out.last_hidden_state.shape == (4, 36, 192) and out.routing.shape == (4, 36, 4)
    assert torch.equal(out.last_hidden_state, base)  # an untrained tower is CLIP
