"""Small trainings, one stage after another, and what their models compute."""

import json

import torch
from train_parts import flags, write_parts, write_records

from tove_llava.train.run import main

HARD = ["--learning_rate", "0.05", "--lora_r", "8"]  # so that the adapters do a lot


def train_stages(folder, **stages):
    """Train stage 1, then the named stages from it: (stage, flag, ...)."""
    write_parts(folder)
    write_records(folder, captions=8, count=8)
    assert main(flags(folder, "pretrain", folder / "stage1", "--max_steps", "2")) == 0
    for name, (stage, *more) in stages.items():
        assert main(flags(folder, stage, folder / name, "--pretrained", str(folder / "stage1"), *more)) == 0
    return folder


def inputs(model):
    """One image and a few bytes, in the model's dtype."""
    ids = [1, *[model.config.image_token_id] * model.config.vision_config.num_image_tokens, 40, 50, 60]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels.to(model.tower.dtype)}


@torch.no_grad()
def logits(model):
    return model(**inputs(model)).logits


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def edit_manifest(folder, language=None, **changes):
    """Change keys of a checkpoint's manifest, and of its language model's entry."""
    file = folder / "tove_llava.json"
    manifest = json.loads(file.read_text())
    manifest["language"] |= language or {}
    file.write_text(json.dumps(manifest | changes))
    return folder
