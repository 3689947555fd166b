"""The vicuna-7b preset in shell scripts, at full width and reduced depth.

Every part has its real input size.
"""

import json
import sys
from pathlib import Path

import pytest
import yaml
from experts_zoo import save_large_experts
from train_parts import byte_tokenizer, losses, run_group, run_script, write_records
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tove_llava.presets import load_preset

pytestmark = pytest.mark.slow


def write_reduced_preset(root: Path) -> Path:
    """Write a preset and its parts, some with two layers only.

    CLIP-L/14-336, EVA, DINOv2 and Vicuna have two layers; depth and edge models are whole.
    """
    published = load_preset("vicuna-7b")
    clip = {**published.vision.clip_config, "num_hidden_layers": 2}
    CLIPVisionModel(CLIPVisionConfig(**clip)).save_pretrained(root / "clip")
    llama = {k: v for k, v in published.language.config.items() if k != "model_type"}
    LlamaForCausalLM(LlamaConfig(**{**llama, "num_hidden_layers": 2})).save_pretrained(root / "llm")
    byte_tokenizer().save_pretrained(root / "llm")
    preset = {
        "extends": "vicuna-7b",
        "vision": {"clip": f"hf:{root / 'clip'}", "experts": save_large_experts(root)},
        "language": {"source": f"hf:{root / 'llm'}"},
    }
    file = root / "reduced.yaml"
    file.write_text(yaml.safe_dump(preset))
    return file


def test_both_stages_run_at_real_width(tmp_path):
    preset = write_reduced_preset(tmp_path)
    write_records(tmp_path)
    stage1, model = tmp_path / "stage1", tmp_path / "model"
    words = ["--max_steps", "2", "--per_device_train_batch_size", "1", "--tf32", "False"]  # a CPU has no TF32
    for name, output, records in (("pretrain", stage1, "captions"), ("finetune_lora", model, "instruct")):
        given = {"NUM_GPUS": 2, "PRESET": preset, "OUTPUT_DIR": output, "DATA_PATH": tmp_path / f"{records}.json"}
        run_script(f"{name}.sh", {**given, "IMAGE_FOLDER": tmp_path / "images", "STAGE1_DIR": stage1}, *words)
        assert len(losses(output, "loss")) == 2
    chat = [sys.executable, "-m", "tove_llava", "chat", "--json", "--max-new-tokens", "4", "--dtype", "float32"]
    question = ["--model", str(model), "--image", str(tmp_path / "images" / "0.png"), "--question", "What is it?"]
    code, text = run_group([*chat, *question], timeout=600)
    assert code == 0, text[-6000:]
    routing = json.loads(text.splitlines()[-1])["routing"]
    assert set(routing[0]) == {"eva", "dinov2", "depth", "edge"} and abs(sum(routing[0].values()) - 1) < 1e-3
