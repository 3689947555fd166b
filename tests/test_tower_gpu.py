"""A GPU may differ: kernels for empty rows, dtypes, moved backbones.

Some dtypes have no CPU path, and backbones are no submodules.
"""

import pytest
import torch
from test_execution import TOLERANCE, assert_same, assert_trains_the_same
from test_llava_model import batch, make_llava, stock_twin, text_batch
from tower_parts import make_tower, open_output, pixels

from tove_llava.llava import VisionInputs
from tove_llava.tower.fused import gated_gelu_sum, supports_fused

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """Convolutions use TF32 by default, which changes the routing by 5e-4."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untrained_tower_gives_llavas_logits(tmp_path, dtype):
    model = make_llava(tmp_path, opened=False)
    twin = stock_twin(model, tmp_path).to("cuda", dtype)
    model.to("cuda", dtype)
    data = {k: v.cuda() for k, v in batch().items()}
    data["pixel_values"] = data["pixel_values"].to(dtype)
    with torch.no_grad():
        assert torch.equal(model(**data).logits, twin(**data).logits)


@pytest.mark.parametrize("keys", [{}, {"top_k": 1}, {"null_slot": True}])
def test_gpu_agrees_with_cpu(tmp_path, keys):
    tower = make_tower(tmp_path, opened=True, **keys)
    expected = tower(pixels())
    actual = tower.cuda()(pixels().cuda())
    assert next(tower.frozen.hub["edge"].parameters()).is_cuda and tower.frozen.clip.device.type == "cuda"
    torch.testing.assert_close(actual.routing.cpu(), expected.routing, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual.last_hidden_state.cpu(), expected.last_hidden_state, atol=1e-3, rtol=1e-3)


def test_dummy_images_touch_everything_and_change_nothing(tmp_path):
    model = make_llava(tmp_path, top_k=1).cuda().train()
    data = {k: v.cuda() for k, v in text_batch().items()}
    expected = model(**data).loss
    out = model(**data, pixel_values=torch.zeros(1, 3, 32, 32, device="cuda"), vision=VisionInputs(dummy=True))
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert all((p.grad == 0).all() for p in model.tower.parameters())


def test_trains_under_bfloat16_autocast(tmp_path):
    model = make_llava(tmp_path, opened=False).cuda().train()
    open_output(model.tower)
    with torch.autocast("cuda", torch.bfloat16):
        out = model(**{k: v.cuda() for k, v in batch().items()})
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.tower.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [1, 4, 8])
def test_the_fused_sum_is_the_plain_one(dtype, experts):
    torch.manual_seed(0)
    hidden = [torch.randn(37, 200, device="cuda", dtype=dtype, requires_grad=True) for _ in range(experts)]
    gates = torch.rand(37, experts, device="cuda").softmax(-1).requires_grad_()
    assert supports_fused(hidden, gates)
    results = []
    for fused in (False, True):
        out = gated_gelu_sum(hidden, gates, fused=fused)
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), [gates, *hidden])])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for plain, fused in zip(*results, strict=True):
        assert (fused - plain).float().norm() <= tolerance * plain.float().norm()


@pytest.mark.parametrize("name", ["concurrent", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_recorded_encoders_are_the_eager_ones(tmp_path, dtype, name):
    tower = make_tower(tmp_path, opened=True).to("cuda", dtype)
    x = pixels(6).to("cuda", dtype)
    expected = {count: tower.encode(x[:count]) for count in (6, 5, 2, 1)}
    whole = tower(x).last_hidden_state
    tower.set_execution(name)
    for count, want in expected.items():  # padded up, and recorded again
        assert_same(tower.encode(x[:count]), want, dtype)
    assert_same(tower.encode(x), expected[6], dtype)
    actual = tower(x).last_hidden_state
    assert (actual - whole).norm() <= TOLERANCE[dtype] * whole.norm()


def test_what_a_replay_gave_is_not_overwritten_by_the_next(tmp_path):
    tower = make_tower(tmp_path).cuda().set_execution("concurrent")
    x = pixels().cuda()
    first = tower.encode(x)
    kept = first.map(torch.clone)
    tower.encode(-x)
    assert_same(first, kept)


def test_recordings_follow_the_tower(tmp_path):
    tower, x = make_tower(tmp_path).cuda(), pixels().cuda()
    plain = make_tower(tmp_path / "twin").cuda()
    tower.set_execution("concurrent").encode(x)
    for change in (
        lambda t: t.detach_experts("edge", free=True),
        lambda t: (t.load_backbones(["edge"]), t.attach_experts("edge")),
        lambda t: t.to(torch.bfloat16),
        lambda t: t.cpu().cuda(),
        lambda t: t.float(),
        lambda t: t.set_attn_implementation("eager"),
        lambda t: t.train(),
    ):
        change(tower)
        change(plain)
        assert_same(tower.encode(x.to(tower.dtype)), plain.encode(x.to(plain.dtype)), tower.dtype)
    with torch.inference_mode():
        inside = tower.encode(x * 1)
    assert_same(inside, plain.encode(x))


@pytest.mark.parametrize("name", ["concurrent", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_training_is_the_same_with_recorded_encoders(tmp_path, dtype, name):
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    tower = make_tower(tmp_path, opened=True).to("cuda", stored).train()
    assert_trains_the_same(tower, pixels(3).to("cuda", stored), name, autocast=dtype == "autocast")


def test_a_non_finite_expert_is_named_after_a_replay(tmp_path):
    tower = make_tower(tmp_path, expert_options={"edge": {"nan_above": 0.5}}).cuda().set_execution("concurrent")
    bright = torch.full((2, 3, 32, 32), 3.0, device="cuda")
    assert not tower.encode(-bright).experts["edge"].isnan().any()
    with pytest.warns(RuntimeWarning, match="'edge' returned non-finite values"):
        assert tower.encode(bright).usable["edge"].tolist() == [False, False]
