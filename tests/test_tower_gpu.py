"""What may differ on a GPU: kernels for empty rows, dtypes without a CPU path, moves of what is no submodule."""

import pytest
import torch
from test_llava_model import batch, make_llava, stock_twin, text_batch
from tower_parts import make_tower, open_output, pixels

pytestmark = pytest.mark.gpu


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
    out = model(**data, pixel_values=torch.zeros(1, 3, 32, 32, device="cuda"), dummy_images=True)
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
