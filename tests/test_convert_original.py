"""The original's unmodified code computes this package's logits for converted folders.

LLAVA_SRC=/path/to/haotian-liu/LLaVA python -m pytest tests/test_convert_original.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_parts import (
    QUESTION,
    make_original,
    pixels,
    write_clip,
    write_language,
    write_lora,
    write_original,
    write_projector,
)
from convert_world import close, ours
from train_parts import environment

from tove_llava import convert_checkpoint
from tove_llava.data import load_tokenizer

CHILD = Path(__file__).parent / "convert_original_child.py"

pytestmark = pytest.mark.skipif(
    not os.environ.get("LLAVA_SRC"), reason="LLAVA_SRC names no checkout of haotian-liu/LLaVA"
)


def in_the_original(folder, work, base=None):
    """Return ``load_pretrained_model``'s logits, ids and CLIP weights.

    It runs in a separate process.
    """
    out = work / f"{folder.name}.pt"
    arguments = [str(folder), str(out), json.dumps(QUESTION), *([str(base)] if base else [])]
    settings = environment(PYTHONPATH=os.environ["LLAVA_SRC"], HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [sys.executable, str(CHILD), *arguments], cwd=work, env=settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    model = make_original(rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    model.round()  # the original loads in half precision
    return model, write_clip(root / "clip", model), write_language(root / "vicuna", model)


@pytest.mark.parametrize("way", [["tove"], ["llava-hf"], ["llava-hf", "tove"]])
def test_whole_model(tmp_path, parts, way):
    model, clip, _ = parts
    folder = write_original(tmp_path / "llava", model, clip)
    for number, to in enumerate([*way, "original"]):
        convert_checkpoint(folder, folder := tmp_path / f"llava-{number}", to)
    seen = in_the_original(folder, tmp_path)
    close(seen["logits"], model.logits(pixels()), 1e-4)
    close(seen["logits"], ours(folder, dtype="float32"), 1e-4)
    own = load_tokenizer(folder)
    assert [own(text).input_ids for text in seen["texts"]] == seen["ids"]
    for name, value in model.clip.state_dict().items():
        assert torch.equal(seen["clip"][name], value), name


def test_projector_and_adapters(tmp_path, parts):
    model, clip, base = parts
    stage1 = write_projector(tmp_path / "stage1" / "llava", model, clip)
    lora, _ = write_lora(tmp_path / "stage2" / "llava-lora", model, clip)
    for source in (stage1, lora):
        convert_checkpoint(source, source.parent / "tove", base=str(base))
        back = source.parent / f"llava-{'lora-' if source is lora else ''}back"
        convert_checkpoint(source.parent / "tove", back, "original")
        seen = in_the_original(back, tmp_path, base)
        # The original adds the adapters in half precision.
        close(seen["logits"], ours(back, base=str(base), dtype="float32"), 2e-2 if source is lora else 1e-4)
        assert not torch.allclose(seen["logits"], torch.zeros_like(seen["logits"]), atol=0.1)
