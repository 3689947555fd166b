"""Packed rows and supervised-only logits give the padded batches' numbers."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llava_model import IMAGE_TOKEN, make_llava
from torch.nn.attention import varlen as torch_varlen
from tower_parts import GRID, pixels, text_config
from train_parts import flags, write_parts, write_records
from transformers import BatchFeature

from tove_llava.core.errors import ConfigError
from tove_llava.data import IGNORE_INDEX, IMAGE_TOKEN_INDEX, LlavaCollator
from tove_llava.llava import loss as loss_module
from tove_llava.llava import varlen
from tove_llava.llava.loss import supervised_loss
from tove_llava.llava.varlen import packed_rows, varlen_attention
from tove_llava.train.run import main

COLLATORS = [LlavaCollator(0, IMAGE_TOKEN, GRID**2, packed=packed) for packed in (False, True)]


def example(length, images=(), seed=0, supervised=3):
    """One text sequence with image placeholders, its last ids supervised."""
    ids = torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(seed))
    ids[list(images)] = IMAGE_TOKEN_INDEX
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[length - supervised :] = ids[length - supervised :]
    labels[ids == IMAGE_TOKEN_INDEX] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels(len(images), seed) if images else None}


EXAMPLES = [
    example(9, images=[2], seed=1),
    example(14, seed=2, supervised=14),  # its first token too, which nothing predicts
    example(12, images=[0, 7], seed=3, supervised=4),
    example(5, images=[1], seed=4, supervised=0),
]


def gradients(model, batch, autocast=False):
    model.zero_grad()
    torch.manual_seed(0)  # of the gate's noise
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        output = model(**batch)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("language", [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}], ids=["mha", "gqa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_row_has_the_loss_and_gradients_of_padded_ones(tmp_path, language, checkpointing):
    model = make_llava(tmp_path, text=text_config(**language)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    padded, packed = (collate(EXAMPLES) for collate in COLLATORS)
    whole, expected = gradients(model, {k: v for k, v in padded.items() if k not in ("supervised", "image_positions")})
    assert whole.aux_loss > 0 and whole.logits.shape[:2] == padded["labels"].shape
    with packed_rows(model.model.language_model):
        output, got = gradients(model, packed)
    assert output.logits is None and output.aux_loss == whole.aux_loss
    torch.testing.assert_close(output.loss, whole.loss, rtol=1e-5, atol=0)
    assert_close(got, expected)
    output, got = gradients(model, padded)  # and padded rows, supervised positions only
    torch.testing.assert_close(output.loss, whole.loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


def assert_rounds_alike(got, expected, exact):
    """Compare within a hundredth, or within the plain form's rounding error.

    That error is the distance of its 16-bit numbers to float32's.
    """
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        difference, own = ((other.float() - value.float()).norm() for other in (got[name], exact[name]))
        assert difference <= max(1e-2 * value.float().norm(), own), f"{name}: {difference}, {own}"
    whole, other = (torch.cat([x[name].float().flatten() for name in expected]) for x in (expected, got))
    assert (other - whole).norm() <= 1e-2 * whole.norm()


def compare_in_16_bits(model, *, autocast):
    """Return loss, balance loss and gradients of padded and packed rows.

    Padded rows come with all logits and without them.
    """
    padded, packed = (BatchFeature(collate(EXAMPLES)).to(model.device) for collate in COLLATORS)
    plain = {k: v for k, v in padded.items() if k not in ("supervised", "image_positions")}
    _, exact = gradients(model, plain)
    if not autocast:
        model.to(torch.bfloat16)
        for batch in (plain, padded, packed):
            batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    whole, expected = gradients(model, plain, autocast)
    with packed_rows(model.model.language_model):
        results = [gradients(model, packed, autocast)]
    results.append(gradients(model, padded, autocast))
    for output, got in results:
        torch.testing.assert_close(output.loss, whole.loss, rtol=1e-2, atol=0)
        torch.testing.assert_close(output.aux_loss, whole.aux_loss, rtol=1e-2, atol=0)
        assert_rounds_alike(got, expected, exact)


@pytest.mark.parametrize(
    ("autocast", "language"), [(True, {}), (False, {"num_attention_heads": 4, "num_key_value_heads": 2})]
)
def test_packed_rows_are_padded_ones_in_16_bits(tmp_path, autocast, language):
    compare_in_16_bits(make_llava(tmp_path, text=text_config(**language)).train(), autocast=autocast)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("groups", [4, 2])
def test_torchs_kernel_gives_the_numbers_of_padded_rows(tmp_path, monkeypatch, autocast, groups):
    """Heads are as wide as the kernel takes them; where it knows no grouped heads, they are repeated."""
    calls, kernel = [], varlen._kernel
    monkeypatch.setattr(varlen, "_kernel", lambda *args: calls.append(1) or kernel(*args))
    language = text_config(hidden_size=64, num_attention_heads=4, num_key_value_heads=groups, head_dim=16)
    compare_in_16_bits(make_llava(tmp_path, text=language).cuda().train(), autocast=autocast)
    assert calls


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(3, 12), min_size=2, max_size=5), st.data())
def test_no_sequence_sees_another(lengths, data):
    g = torch.Generator().manual_seed(sum(lengths))
    states = [torch.randn(1, heads, sum(lengths), 4, generator=g) for heads in (4, 2, 2)]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    arguments = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths)}
    before, _ = varlen_attention(torch.nn.Identity(), *states, None, **arguments)
    changed = data.draw(st.integers(0, len(lengths) - 1))
    start, end = bounds[changed : changed + 2].tolist()
    for tensor in states:
        tensor[:, :, start:end] += 1.0
    after, _ = varlen_attention(torch.nn.Identity(), *states, None, **arguments)
    assert after.shape == (1, sum(lengths), 4, 4)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[start:end] = False
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, start:end], after[:, start:end])


@pytest.mark.parametrize("scale", [None, 0.1, 3.0])
def test_attention_is_torchs_at_every_scale(scale):
    states = [torch.randn(1, heads, 9, 4) for heads in (4, 2, 2)]
    bounds = {"cu_seq_lens_q": torch.tensor([0, 9], dtype=torch.int32), "max_length_q": 9}
    out, _ = varlen_attention(torch.nn.Identity(), *states, None, scaling=scale, **bounds)
    plain = torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True, scale=scale, enable_gqa=True)
    torch.testing.assert_close(out, plain.transpose(1, 2))


def test_attention_follows_autocast():
    states = [torch.randn(1, 2, 9, 4) for _ in range(3)]
    arguments = {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32), "max_length_q": 5}
    with torch.autocast("cpu", torch.bfloat16):
        states[2] = states[2].bfloat16()  # projected in bfloat16, and not rotated
        out, _ = varlen_attention(torch.nn.Identity(), *states, None, **arguments)
    plain, _ = varlen_attention(torch.nn.Identity(), *(x.float() for x in states), None, **arguments)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain, rtol=2e-2, atol=2e-2)
    rounded = [x.bfloat16().float() for x in states]  # on the CPU nothing else is rounded but the result
    plain, _ = varlen_attention(torch.nn.Identity(), *rounded, None, **arguments)
    assert torch.equal(out, plain.bfloat16())


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("has_groups", [False, True])
def test_torchs_kernel_is_used_and_gives_the_plain_numbers(monkeypatch, groups, has_groups):
    """A GPU and torch's kernel have stand-ins, with and without grouped heads."""
    calls = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        calls.append((key.shape, window_size, scale))
        rows = [states.transpose(0, 1) for states in (query, key, value)]
        pieces = [x.split(cu_seq_q.diff().tolist(), dim=1) for x in rows]
        options = {"is_causal": True, "scale": scale, "enable_gqa": has_groups}
        attention = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([attention(*piece, **options) for piece in zip(*pieces, strict=True)], dim=1).transpose(0, 1)

    def newer(*args, enable_gqa=False, scale=None, window_size=(-1, -1)):
        assert enable_gqa == (groups < 4)
        return kernel(*args, scale=scale, window_size=window_size)

    states = [torch.randn(1, heads, 9, 4) for heads in (4, groups, groups)]
    bounds = {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32), "max_length_q": 5}
    plain, _ = varlen_attention(torch.nn.Identity(), *states, None, scaling=0.1, **bounds)
    monkeypatch.setattr(varlen, "_runs_on", lambda query: True)
    monkeypatch.setattr(torch_varlen, "varlen_attn", newer if has_groups else kernel)
    out, _ = varlen_attention(torch.nn.Identity(), *states, None, scaling=0.1, **bounds)
    assert calls == [((9, groups if has_groups else 4, 4), (-1, 0), 0.1)]
    torch.testing.assert_close(out, plain)


def test_a_packed_batch_holds_what_a_padded_one_does():
    padded, packed = (collate(EXAMPLES) for collate in COLLATORS)
    real = padded["attention_mask"].bool()
    lengths = real.sum(1).tolist()
    assert packed["cu_seq_lens_q"].tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert packed["cu_seq_lens_q"].dtype == torch.int32 and packed["max_length_q"] == max(lengths)
    assert torch.equal(packed["input_ids"][0], padded["input_ids"][real])
    assert packed["position_ids"][0].tolist() == [place for length in lengths for place in range(length)]
    assert torch.equal(packed["pixel_values"], padded["pixel_values"])
    for batch in (padded, packed):
        following = batch["labels"][:, 1:]
        assert torch.equal(batch["labels"].flatten()[batch["supervised"] + 1], following[following != IGNORE_INDEX])
    assert len(packed["supervised"]) == len(padded["supervised"]) == 3 + 13 + 4
    assert "attention_mask" not in packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 7, 8])
def test_the_loss_in_pieces_is_the_loss(monkeypatch, count, dtype):
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 11, dtype=dtype)
    hidden = torch.randn(2, 6, 5, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 11, (2, 6))
    positions = torch.randperm(10)[:count].sort().values
    positions = positions + (positions >= 5).long()  # the last of a row has no label after it
    logits = head(hidden.flatten(0, 1)[positions]).float()
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten()[positions + 1], reduction="sum") / 4
    expected.backward()
    wanted = [hidden.grad.clone(), head.weight.grad.clone(), head.bias.grad.clone()]
    for piece in (2**26, 3 * 11):
        hidden.grad = head.weight.grad = head.bias.grad = None
        monkeypatch.setattr(loss_module, "PIECE", piece)
        loss = supervised_loss(hidden, labels, positions, head, 4)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for got, value in zip([hidden.grad, head.weight.grad, head.bias.grad], wanted, strict=True):
            assert (got - value).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * value.norm()


def test_what_is_not_a_packed_row_is_refused(tmp_path):
    model = make_llava(tmp_path)
    before = model.model.language_model.config._attn_implementation
    with packed_rows(model.model.language_model), pytest.raises(ConfigError, match="only packed rows"):
        model(**{k: v for k, v in COLLATORS[0](EXAMPLES).items() if k not in ("supervised", "image_positions")})
    assert model.model.language_model.config._attn_implementation == before
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match="flex_attention"), packed_rows(model.model.language_model):
        pass


@pytest.mark.parametrize("stage", ["pretrain", "finetune_lora", "finetune"])
def test_a_run_without_padding_learns_the_same(tmp_path, stage):
    write_parts(tmp_path)
    write_records(tmp_path, pattern="iitt", count=8, captions=8)
    assert main(flags(tmp_path, "pretrain", tmp_path / "stage1", "--max_steps", "1")) == 0
    more = ["--max_steps", "2"] + (["--pretrained", str(tmp_path / "stage1")] if stage != "pretrain" else [])
    histories = []
    for value in ("False", "True"):
        output = tmp_path / f"padding_free-{value}"
        assert main(flags(tmp_path, stage, output, *more, "--padding_free", value)) == 0
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        histories.append([[entry[k] for k in ("lm_loss", "aux_loss")] for entry in history if "lm_loss" in entry])
        config = json.loads((output / "config.json").read_text())
        assert "varlen" not in json.dumps(config)
    torch.testing.assert_close(torch.tensor(histories[1]), torch.tensor(histories[0]), rtol=1e-5, atol=1e-5)
    assert histories[0][0] != histories[0][1]
