import pytest
import torch
from tower_parts import GRID, open_output, pixels, text_config, tower_config
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tove_llava.llava import ToveLlavaConfig, ToveLlavaForConditionalGeneration

IMAGE_TOKEN = 63


def make_llava(folder, cls=ToveLlavaForConditionalGeneration, opened=True, text=None, **keys):
    torch.manual_seed(5)
    config_cls = ToveLlavaConfig if cls is ToveLlavaForConditionalGeneration else LlavaConfig
    config = config_cls(
        vision_config=tower_config(folder, **keys),
        text_config=text or text_config(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = cls(config).eval()
    model.model.vision_tower.load_backbones()
    if opened:
        open_output(model.model.vision_tower)
    return model


def batch(images=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (images, 6), generator=g)
    ids = torch.cat([ids[:, :2], torch.full((images, GRID**2), IMAGE_TOKEN), ids[:, 2:]], dim=1)
    labels = ids.clone()
    labels[:, : 2 + GRID**2] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(images)}


@pytest.mark.parametrize("cls", [LlavaForConditionalGeneration, ToveLlavaForConditionalGeneration])
def test_saved_equals_loaded_and_generates(tmp_path, cls):
    model = make_llava(tmp_path / "parts", cls)
    model.save_pretrained(tmp_path / "saved")
    loaded = cls.from_pretrained(tmp_path / "saved")
    if cls is LlavaForConditionalGeneration:
        loaded.model.vision_tower.load_backbones()
    data = batch()
    assert torch.equal(model(**data).logits, loaded(**data).logits)
    prompt = {k: v for k, v in data.items() if k != "labels"}
    first, second = (m.generate(**prompt, max_new_tokens=4, do_sample=False) for m in (model, loaded))
    assert first.shape[1] > prompt["input_ids"].shape[1] and torch.equal(first, second)
