"""haotian-liu/LLaVA itself with our tower.

``LLAVA_SRC`` names its folder; without it these tests skip.

Each test is a separate process (or group of them), because ``llava`` registers itself with transformers.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from docs_pages import read_page
from safetensors.torch import load_file
from train_parts import ROOT, environment, free_port, run_group, write_records

from tove_llava.core.sources import BundledSource

PAGE = ROOT / "docs" / "guides" / "original-llava.md"
LLM, TINY = BundledSource("llm").require(), "tove:tiny"


@pytest.fixture(scope="session")
def llava():
    if "LLAVA_SRC" not in os.environ:
        pytest.skip("LLAVA_SRC does not name the folder of haotian-liu/LLaVA")
    return Path(os.environ["LLAVA_SRC"])


@pytest.fixture
def folder(tmp_path):
    """Records, and the page's files."""
    write_records(tmp_path)
    for block in read_page(PAGE).blocks:
        if block.file is not None:
            (tmp_path / block.file).write_text(block.text)
    return tmp_path


def python(llava, folder, *arguments, timeout=300, **kwargs):
    env = environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(llava)]))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        **kwargs,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def flags(folder, output, data, *more):
    return [
        "--model_name_or_path", LLM, "--data_path", folder / data, "--image_folder", folder / "images",
        "--vision_tower", TINY, "--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", -2,
        "--mm_use_im_start_end", False, "--mm_use_im_patch_token", False, "--use_cpu", True,
        "--output_dir", output, "--num_train_epochs", 1, "--per_device_train_batch_size", 4, "--learning_rate", 2e-3,
        "--lr_scheduler_type", "constant", "--model_max_length", 512, "--report_to", "none", "--logging_steps", 1,
        *more,
    ]  # fmt: skip


def trained_parts(file):
    """The tower's tensors in what LLaVA wrote."""
    load = load_file if file.suffix == ".safetensors" else lambda f: torch.load(f, weights_only=True)
    return {name.partition(".tove.")[2]: value.float() for name, value in load(file).items() if ".tove." in name}


def moved(before, after):
    assert before.keys() == after.keys() and len(before) > 15
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_original_runs_with_our_tower(llava, tmp_path):
    """The tests in original_llava_checks.py."""
    checks = ROOT / "tests" / "original_llava_checks.py"
    said = python(llava, ROOT, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", tmp_path / "t", checks)
    assert re.search(r"^\d\d passed", said, re.MULTILINE) and "skipped" not in said


@pytest.mark.slow
def test_its_train_script_runs_both_stages_and_its_loader_and_server_run_the_result(llava, folder):
    pretrain, lora = Path("checkpoints/llava-tove-pretrain"), Path("checkpoints/llava-tove-lora")
    first = flags(
        folder, pretrain, "captions.json", "--version", "plain", "--tune_mm_mlp_adapter", True, "--bf16", True
    )
    python(llava, folder, "train_tove.py", *first, "--save_strategy", "steps", "--save_steps", 2)
    early = trained_parts(folder / pretrain / "checkpoint-2" / "mm_projector.bin")
    late = trained_parts(folder / pretrain / "mm_projector.bin")
    assert moved(early, late) == set(late), "a trained part has not moved in stage 1"

    adapter = ["--pretrain_mm_mlp_adapter", pretrain / "mm_projector.bin", "--version", "v1"]
    second = flags(folder, lora, "instruct.json", *adapter, "--group_by_modality_length", True)
    tuning = ["--lora_enable", True, "--lora_r", 4, "--image_aspect_ratio", "pad", "--gradient_checkpointing", True]
    python(llava, folder, "train_tove.py", *second, *tuning, "--bf16", True, "--save_strategy", "no")
    tuned = trained_parts(folder / lora / "non_lora_trainables.bin")
    assert moved(late, tuned) == set(late)
    # A step of AdamW moves a value by about its learning rate: stage 2 went on from stage 1's values.
    assert max((tuned[name] - late[name]).abs().max() for name in late) < 0.02

    (folder / "lmsys").mkdir()
    (folder / "lmsys" / "vicuna-7b-v1.5").symlink_to(LLM)
    (folder / "images" / "0.png").rename(folder / "photo.png")
    assert python(llava, folder, "load_tove.py").endswith("\n")
    model = ["--model-path", lora, "--model-base", "lmsys/vicuna-7b-v1.5", "--image-file", "photo.png"]
    chat = ["llava.serve.cli", *model, "--device", "cpu", "--max-new-tokens", 8]
    said = python(llava, folder, "run_tove.py", *chat, input="What is it?\n\n")
    assert "Assistant: " in said and said.rstrip().endswith("exit...")


# LLaVA's train.py takes a GPU for granted in two places when DeepSpeed is used.
ON_CPU = "import deepspeed, torch\ntorch.cuda.synchronize = lambda: None\ndeepspeed.init_distributed()\n"


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_ranks_train_a_whole_model_under_deepspeed(llava, folder, zero):
    """Some records have no image, so some rank steps have none."""
    launcher = folder / "train_tove.py"
    launcher.write_text(ON_CPU + launcher.read_text())
    arguments = flags(folder, folder / "llava-out", "instruct.json", "--version", "v1", "--save_strategy", "no")
    python_path = os.pathsep.join([str(ROOT), str(llava)])
    code, output = run_group(
        [
            "env", f"PYTHONPATH={python_path}", sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2",
            "--master_port", str(free_port()), "--no_local_rank", str(launcher), "--deepspeed",
            str(llava / "scripts" / f"{zero}.json"), *map(str, arguments),
            "--per_device_train_batch_size", "1", "--max_steps", "4", "--bf16", str(zero == "zero2"),
        ],
        timeout=300,
    )  # fmt: skip
    assert code == 0, f"exit code {code}, and last:\n{output[-2500:]}"
    assert all(value.abs().sum() > 0 for value in trained_parts(folder / "llava-out" / "model.safetensors").values())
    losses = [float(x) for x in re.findall(r"'loss': '([^']+)'", output)]
    assert len(losses) == 4 and all(0 < x < 50 for x in losses)
