import pytest
import torch
from tower_parts import make_tower, pixels
from transformers import CLIPVisionModel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untrained_tower_is_clip(tmp_path, dtype):
    tower = make_tower(tmp_path).to(dtype)
    clip = CLIPVisionModel.from_pretrained(tmp_path / "clip", dtype=dtype).eval()
    x = pixels().to(dtype)
    expected = clip(x, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(tower(x).last_hidden_state, expected)
    tower.train()
    assert torch.equal(tower(x).last_hidden_state, expected)
