import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from tower_parts import make_tower, pixels, tower_config

from tove_llava.core.errors import ConfigError
from tove_llava.testing import check_fusion
from tove_llava.tower import ToveVisionConfig, ToveVisionModel
from tove_llava.tower.gate import Float32Linear, Gate, GateOutput, TokenGate, register_gate


def make_gate(slots=4, noisy=True, top_k=None, width=8, seed=0):
    torch.manual_seed(seed)
    gate = TokenGate(width, slots, noisy=noisy, top_k=top_k)
    with torch.no_grad():
        gate.score.weight.normal_()
        if noisy:
            gate.noise.weight.normal_()
    return gate


def everything(batch, slots):
    return torch.ones(batch, slots, dtype=torch.bool)


def test_gate_is_the_formula():
    gate = make_gate()
    tokens, eps = torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    normed = F.layer_norm(tokens, (8,))
    std = F.softplus(normed @ gate.noise.weight.T)
    expected = (normed @ gate.score.weight.T + std * eps).softmax(-1)
    torch.testing.assert_close(gate(tokens, everything(2, 4), eps).weights, expected)
    torch.testing.assert_close(gate(tokens, everything(2, 4)).weights, (normed @ gate.score.weight.T).softmax(-1))


@settings(max_examples=40, deadline=None)
@given(slots=st.integers(1, 5), top_k=st.none() | st.integers(1, 5), mask=st.integers(0, 31), seed=st.integers(0, 99))
def test_rows_sum_to_one_over_the_allowed_and_selected(slots, top_k, mask, seed):
    gate = make_gate(slots, top_k=top_k, seed=seed)
    allowed = torch.tensor([[bool(mask >> i & 1) for i in range(slots)]])
    out = gate(torch.randn(1, 6, 8), allowed, torch.randn(1, 6, slots))
    count = int(allowed.sum())
    chosen = min(top_k or slots, count)
    assert (out.weights[..., ~allowed[0]] == 0).all()
    assert ((out.weights > 0).sum(-1) == chosen).all() and (out.selected.sum(-1) == chosen).all()
    torch.testing.assert_close(out.weights.sum(-1), torch.full((1, 6), float(count > 0)))
    out.weights.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in gate.parameters())


def test_top_k_keeps_the_largest_logits_before_the_softmax():
    gate = make_gate(4, noisy=False, top_k=2)
    out = gate(torch.randn(3, 7, 8), everything(3, 4))
    values, index = out.logits.topk(2, dim=-1)
    torch.testing.assert_close(out.weights.gather(-1, index), values.softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_works_in_float32_whatever_surrounds_it(dtype):
    gate = make_gate()
    tokens, eps = torch.randn(1, 5, 8).to(dtype), torch.randn(1, 5, 4)
    plain = gate(tokens, everything(1, 4), eps)
    assert plain.weights.dtype == plain.logits.dtype == plain.load.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = gate(tokens, everything(1, 4), eps)
    assert torch.equal(plain.weights, inside.weights) and torch.equal(plain.load, inside.load)


def test_noise_is_for_training_only_and_may_be_given(tmp_path):
    tower = make_tower(tmp_path, opened=True)
    x = pixels()
    assert torch.equal(tower(x).routing, tower(x).routing)
    assert torch.equal(tower(x, gate_noise=torch.randn(2, 16, 3)).routing, tower(x).routing)
    tower.train()
    assert not torch.equal(tower(x).routing, tower(x).routing)
    noise = torch.randn(2, 16, 3)
    assert torch.equal(tower(x, gate_noise=noise).routing, tower(x, gate_noise=noise).routing)
    assert torch.equal(tower(x, gate_noise=noise).gate_inputs.noise, noise)
    with pytest.raises(ConfigError, match=r"\(2, 16, 3\)"):
        tower(x, gate_noise=noise[:1])
    quiet = make_tower(tmp_path / "quiet", opened=True, noisy_gating=False).train()
    assert torch.equal(quiet(x).routing, quiet(x).routing) and quiet(x).gate_inputs.noise is None


def test_a_share_of_the_global_noise_gives_a_share_of_the_routing(tmp_path):
    tower = make_tower(tmp_path, opened=True).train()
    x, noise = pixels(4), torch.randn(4, 16, 3)
    whole = tower(x, gate_noise=noise)
    for part in (slice(0, 1), slice(1, 4)):
        share = tower(x[part], gate_noise=noise[part])
        torch.testing.assert_close(share.routing, whole.routing[part])
        torch.testing.assert_close(share.last_hidden_state, whole.last_hidden_state[part])


def test_null_slot_receives_nothing(tmp_path):
    tower = make_tower(tmp_path, opened=True, null_slot=True)
    x = pixels()
    out = tower(x)
    assert out.routing.shape == (2, 16, 4)
    with torch.no_grad():  # everything to the null slot
        tower.fusion.gate.norm.bias.fill_(1.0)
        tower.fusion.gate.score.weight.fill_(0.0)
        tower.fusion.gate.score.weight[3] = 50.0
    closed = tower(x)
    assert (closed.routing[..., 3] > 0.999).all()
    torch.testing.assert_close(closed.last_hidden_state, tower.encode(x).base, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("null_slot", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_sparse_computation_equals_the_dense_formula(tmp_path, null_slot, training):
    tower = make_tower(tmp_path, opened=True, top_k=2, null_slot=null_slot).train(training)
    features = tower.encode(pixels())
    out = tower.fuse(features)
    mixed = 0
    for k, name in enumerate(tower.config.expert_names):
        embedding = tower.fusion.embeddings[name]
        hidden = embedding(embedding.rows(features.experts[name])).view(2, 16, -1)
        mixed = mixed + out.routing[..., k, None] * hidden
    torch.testing.assert_close(out.last_hidden_state, features.base + tower.fusion.output(mixed))


def test_unselected_rows_are_not_projected(tmp_path):
    tower = make_tower(tmp_path, opened=True, top_k=1)
    rows = {}
    for name, embedding in tower.fusion.embeddings.items():
        embedding.linear.register_forward_pre_hook(lambda _, args, name=name: rows.update({name: len(args[0])}))
    out = tower(pixels())
    counts = (out.routing > 0).flatten(0, 1).sum(0).tolist()
    assert [rows[name] for name in tower.config.expert_names] == counts
    assert sum(rows.values()) == 2 * 16 and max(rows.values()) < 2 * 16


def test_initial_weights_are_nearly_even_and_ties_are_broken(tmp_path):
    tower = make_tower(tmp_path, top_k=1, noisy_gating=False)
    with torch.no_grad():
        tower.frozen.clip.encoder.layers[-1].mlp.fc2.weight.normal_()  # tokens that differ, as those of a trained CLIP
    assert len(tower(pixels(8)).routing.argmax(-1).unique()) > 1
    even = make_tower(tmp_path / "even")
    torch.testing.assert_close(even(pixels()).routing, torch.full((2, 16, 3), 1 / 3), atol=0.03, rtol=0)


@pytest.mark.parametrize("width", [16, 192, 768])
@pytest.mark.parametrize("top_k", [None, 1])
def test_a_gate_with_fewer_columns_gives_the_others_the_same_bits(width, top_k):
    torch.manual_seed(width)
    whole = TokenGate(width, 5, noisy=False, top_k=top_k)
    torch.nn.init.normal_(whole.score.weight)
    kept = [0, 3, 4]
    part = TokenGate(width, len(kept), noisy=False, top_k=top_k)
    part.load_state_dict({**whole.state_dict(), "score.weight": whole.score.weight[kept]})
    tokens = torch.randn(2, 36, width)
    allowed = torch.tensor([[column in kept for column in range(5)]]).expand(2, -1)
    masked, sliced = whole(tokens, allowed), part(tokens, torch.ones(2, len(kept), dtype=torch.bool))
    assert torch.equal(masked.logits[..., kept], sliced.logits)
    assert torch.equal(masked.weights[..., kept], sliced.weights)


@register_gate("sharp")
class SharpGate(Gate):
    """A gate of a user's own: the softmax of ten times a linear map, without noise."""

    rows = ("score.weight",)

    def __init__(self, width, slots):
        super().__init__(width, slots)
        self.score = Float32Linear(width, slots, std=0.1)

    def forward(self, tokens, allowed, eps=None):
        selected = allowed[:, None].expand(-1, tokens.shape[1], -1)
        logits = 10 * self.score(tokens)
        weights = logits.masked_fill(~selected, -1e9).softmax(-1).masked_fill(~selected, 0)
        return GateOutput(weights, logits, selected, None)


@pytest.mark.parametrize("fusion", ["tove", "replace"])
def test_a_gate_is_chosen_by_its_name(tmp_path, fusion):
    tower = make_tower(tmp_path / "parts", opened=True, fusion=fusion, fusion_options={"gate": "sharp"}, null_slot=True)
    assert type(tower.fusion.gate) is SharpGate and tower(pixels()).routing.shape == (2, 16, 4)
    check_fusion(fusion, {"gate": "sharp"})
    output = tower.train()(pixels())
    (output.last_hidden_state.square().mean() + tower.balance_loss(output)).backward()
    assert tower.fusion.gate.score.weight.grad.abs().sum() > 0
    tower.save_pretrained(tmp_path / "saved")
    again = ToveVisionModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(pixels()).routing, tower.eval()(pixels()).routing)


def test_a_gate_without_top_k_and_an_unknown_gate_are_refused(tmp_path):
    config = tower_config(tmp_path).to_dict()
    for change, words in (
        ({"fusion_options": {"gate": "sharp"}, "top_k": 2}, "gate 'sharp' knows no top_k"),
        ({"fusion_options": {"gate": "sharpp"}}, "unknown gate 'sharpp'. Did you mean 'sharp'"),
        ({"fusion_options": {"gate": "sharp"}, "fusion": "add"}, "unknown fusion_options"),
    ):
        with pytest.raises(ConfigError, match=words):
            ToveVisionModel(ToveVisionConfig.from_dict(config | change))
