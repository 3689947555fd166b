"""Every registered fusion: shapes, detaching, gradients, LLaVA around it, own traits."""

import pytest
import torch
from torch.nn import functional as F
from tower_parts import GRID, make_tower, pixels, text_config, tower_config
from transformers import LlamaForCausalLM

from tove_llava.core.errors import ConfigError
from tove_llava.llava.build import assemble
from tove_llava.presets import ProjectorPreset
from tove_llava.tower import FUSIONS, ToveVisionModel

WITH_EXPERTS = sorted(set(FUSIONS.names()) - {"none"})
CLOSED = ["add", "top1", "tove"]  # start as CLIP
NAMES = ("depth", "edge", "normal")


def opened(folder, fusion, **keys):
    """A tower in eval mode with random parameters, none of them zero."""
    tower = make_tower(folder, fusion=fusion, **keys)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tower.fusion.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return tower


@pytest.mark.parametrize("fusion", FUSIONS.names())
def test_output_has_the_configured_shape(tmp_path, fusion):
    tower = opened(tmp_path, fusion) if fusion != "none" else make_tower(tmp_path, fusion=fusion)
    config = tower.config
    tokens = tower(pixels(2)).last_hidden_state
    assert tokens.shape == (2, config.num_image_tokens, config.hidden_size)
    assert torch.isfinite(tokens).all()
    if fusion in CLOSED:
        untrained = make_tower(tmp_path / "untrained", fusion=fusion)
        assert torch.equal(untrained(pixels(2)).last_hidden_state, untrained.encode(pixels(2)).base)


@pytest.mark.parametrize("fusion", WITH_EXPERTS)
def test_detached_expert_is_not_run_and_has_no_influence(tmp_path, fusion):
    tower = opened(tmp_path, fusion)
    features = tower.encode(pixels(2))
    whole = tower.fuse(features).last_hidden_state
    tower.detach_experts("edge")
    reduced = tower.fuse(tower.encode(pixels(2))).last_hidden_state
    features.experts["edge"] = features.experts["edge"] * 100
    assert torch.equal(tower.fuse(features).last_hidden_state, reduced)
    assert reduced.shape != whole.shape or not torch.allclose(reduced, whole)
    assert reduced.shape[1] == tower.config.num_image_tokens
    tower.attach_experts("edge")
    assert torch.equal(tower(pixels(2)).last_hidden_state, whole)


@pytest.mark.parametrize("fusion", FUSIONS.names())
def test_llava_trains_and_generates_with_it(tmp_path, fusion):
    torch.manual_seed(0)
    language = LlamaForCausalLM(text_config())
    model = assemble(language, tower_config(tmp_path, fusion=fusion), ProjectorPreset())
    model.config.image_token_index = 63
    model.tower.load_backbones()
    count = model.config.vision_config.num_image_tokens
    ids = torch.tensor([[1, *[63] * count, 5, 6, 7]])
    labels = torch.where(ids == 63, -100, ids)
    loss = model.train()(input_ids=ids, pixel_values=pixels(1), labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    output = model.eval().generate(input_ids=ids, pixel_values=pixels(1), max_new_tokens=3, do_sample=False)
    assert output.shape[1] > ids.shape[1]


@pytest.mark.parametrize("fusion", WITH_EXPERTS)
def test_needs_experts_and_refuses_unknown_options(tmp_path, fusion):
    with pytest.raises(ConfigError, match="at least one expert"):
        ToveVisionModel(tower_config(tmp_path, names=(), fusion=fusion))
    with pytest.raises(ConfigError, match="stem_widht"):
        ToveVisionModel(tower_config(tmp_path / "b", fusion=fusion, fusion_options={"stem_widht": 3}))


def test_add_is_the_mean_of_the_experts(tmp_path):
    tower = opened(tmp_path, "add")
    features = tower.encode(pixels(2))
    hidden = [tower.fusion.embeddings.hidden(name, features.experts[name], None) for name in NAMES]
    expected = features.base + F.linear(sum(hidden) / 3, tower.fusion.output.weight)
    torch.testing.assert_close(tower.fuse(features).last_hidden_state, expected)
    features.usable = {"depth": torch.tensor([False, True])}
    expected[0] = features.base[0] + F.linear((hidden[1][0] + hidden[2][0]) / 2, tower.fusion.output.weight)
    torch.testing.assert_close(tower.fuse(features).last_hidden_state, expected)


def test_top1_takes_the_likeliest_expert_with_its_probability(tmp_path):
    tower = opened(tmp_path, "top1")
    features = tower.encode(pixels(2))
    output = tower.fuse(features)
    probability = output.gate_logits.softmax(-1)
    best = probability.argmax(-1)
    assert len(best.unique()) > 1, "the gate has to choose differently for this test to say anything"
    hidden = torch.stack([tower.fusion.embeddings.hidden(n, features.experts[n], None) for n in NAMES], dim=2)
    chosen = hidden.gather(2, best[..., None, None].expand(-1, -1, 1, hidden.shape[-1])).squeeze(2)
    weight = probability.gather(-1, best[..., None])
    expected = features.base + F.linear(weight * chosen, tower.fusion.output.weight)
    torch.testing.assert_close(output.last_hidden_state, expected)
    assert ((output.routing > 0).sum(-1) == 1).all()
    tower.train().fuse(features).last_hidden_state.square().sum().backward()
    assert tower.fusion.gate.score.weight.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="top1"):
        make_tower(tmp_path / "b", fusion="top1", top_k=2)


def test_replace_keeps_nothing_of_clip_beside_one_expert(tmp_path):
    tower = opened(tmp_path, "replace", names=("depth",))
    features = tower.encode(pixels(2))
    tokens = tower.fuse(features).last_hidden_state
    features.base = torch.randn_like(features.base)
    assert torch.equal(tower.fuse(features).last_hidden_state, tokens)
    tower.detach_experts("depth")
    assert tower.fuse(features).last_hidden_state.abs().sum() == 0


def test_channel_concat_keeps_clip_in_the_first_channels(tmp_path):
    tower = opened(tmp_path, "channel_concat")
    features = tower.encode(pixels(2))
    tokens = tower.fuse(features).last_hidden_state
    width = tower.config.projection_dim
    assert torch.equal(tokens[..., : tower.config.clip_width], features.base)
    for k, name in enumerate(NAMES):
        start = tower.config.clip_width + k * width
        expected = tower.fusion.embeddings.hidden(name, features.experts[name], None)
        assert torch.equal(tokens[..., start : start + width], expected)


def test_sequence_append_pools_the_experts_grid(tmp_path):
    tower = opened(tmp_path, "sequence_append")
    features = tower.encode(pixels(2))
    tokens = tower.fuse(features).last_hidden_state
    count = (GRID // 2) ** 2
    assert tokens.shape[1] == GRID**2 + 3 * count
    hidden = tower.fusion.embeddings.hidden("depth", features.experts["depth"], None)
    corner = hidden[:, [0, 1, GRID, GRID + 1]].mean(1)
    torch.testing.assert_close(tokens[:, GRID**2], F.linear(corner, tower.fusion.output.weight))
    tower.detach_experts("depth")
    assert tower(pixels(2)).last_hidden_state.shape[1] == GRID**2 + 2 * count
    with pytest.raises(ConfigError, match="pool=3"):
        make_tower(tmp_path / "b", fusion="sequence_append", fusion_options={"pool": 3})
