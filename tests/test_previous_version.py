"""Folders of an older version (commit e793b18) open as they did there.

That commit is taken from the clone's own history, and its own commands write the folders. A clone without that history
cannot run these tests.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

COMMIT = "e793b1866ee6a7450e7af26db70ab8ceebd50585"
ROOT = Path(__file__).resolve().parents[1]

# Prints a digest of the logits of one question, for each folder that is named.
ASK = """
import hashlib, importlib, json, pathlib, sys
import torch
import tove_llava
from tove_llava.data import Turn
# Asked of the disk: an editable installation would find the present package's room for the former one too.
room = "inference" if (pathlib.Path(tove_llava.__file__).parent / "inference").is_dir() else "serve"
Answerer = importlib.import_module(f"tove_llava.{room}.generation").Answerer
picture, *folders = sys.argv[1:]
found = {}
for folder in folders:
    answerer = Answerer.load(folder)
    ids = torch.tensor([answerer.encode([Turn("user", "<image>\\nWhat is in the picture?")], 1)])
    with torch.no_grad():
        pixels = answerer.pixels(picture)[None]
        logits = answerer.model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
    found[folder] = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
print(json.dumps(found))
"""


def run(root: Path, *words: object) -> str:
    """Runs Python on the package in ``root``; returns what it printed."""
    settings = {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=root, env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return done.stdout + done.stderr


def train(root: Path, data: Path, stage: str, records: str, out: Path, *words: object) -> str:
    """Run a stage for four steps, with a checkpoint after every second."""
    settings = {"preset": "tiny", "stage": stage, "output_dir": out, "data_path": data / records, "deepspeed": "none"}
    settings |= {"image_folder": data / "images", "max_steps": 4, "save_steps": 2, "save_total_limit": 2}
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return run(root, "-m", "tove_llava.train.run", *flags, "--report_to", "none", *words)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The former package, unpacked."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", COMMIT], capture_output=True)
    if archive.returncode:
        pytest.skip(f"this clone's history does not reach back to {COMMIT[:7]}")
    folder = tmp_path_factory.mktemp("package")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


@pytest.fixture(scope="module")
def written(old: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes, checkpoints, exports, feature cache and answers of its commands."""
    place = tmp_path_factory.mktemp("written")
    scenes, lora, plain = place / "scenes", place / "lora", place / "plain"
    verb = ("-m", "tove_llava")
    run(old, *verb, "scenes", "--out", scenes, "--train", 24, "--val", 6, "--seed", 0)
    train(old, scenes, "pretrain", "train_captions.json", place / "trained")
    train(old, scenes, "finetune_lora", "train_instruct.json", lora, "--pretrained", place / "trained")
    run(old, *verb, "merge-lora", "--model", lora, "--out", place / "full")
    run(old, *verb, "detach", "--model", lora, "--experts", "depth,normal,edge,segmentation", "--out", plain)
    run(old, *verb, "export", "--model", plain, "--out", place / "exported")
    run(old, *verb, "convert", "--model", plain, "--to", "original", "--out", place / "original_llava_lora")
    data = ("--data", scenes / "train_captions.json", "--image-folder", scenes / "images")
    run(old, *verb, "features", *data, "--image-aspect-ratio", "square", "--out", place / "cache")
    evaluate(old, place)
    return place


def evaluate(root: Path, place: Path) -> None:
    scenes = place / "scenes"
    run(root, "-m", "tove_llava", "eval", "--model", place / "lora", "--benchmark", "scenes", "--data-root", scenes)


def test_logits_are_the_same(old: Path, written: Path):
    kinds = ("trained", "lora", "full", "plain", "exported")
    asked = ("-c", ASK, written / "scenes" / "images" / "val_000000.png", *(written / kind for kind in kinds))
    before, now = (json.loads(run(root, *asked).splitlines()[0]) for root in (old, ROOT))
    assert len(now) == len(kinds) and now == before


def test_an_original_folder_converts_to_the_same_files(old: Path, written: Path, tmp_path: Path):
    folders = {root: tmp_path / name for root, name in ((old, "before"), (ROOT, "now"))}
    for root, folder in folders.items():
        model = ("--model", written / "original_llava_lora", "--base", "bundled:llm")
        run(root, "-m", "tove_llava", "convert", *model, "--out", folder)
    weights = [sorted(folder.rglob("*.safetensors")) for folder in folders.values()]
    assert weights[0] and [file.name for file in weights[0]] == [file.name for file in weights[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*weights, strict=True))


def test_an_interrupted_run_goes_on_and_a_finished_one_is_known(written: Path, tmp_path: Path):
    shutil.copytree(written / "trained", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoint-4")
    for name in ("tove_llava.json", "trained.safetensors"):
        (tmp_path / "half" / name).unlink()
    again = (written / "scenes", "pretrain", "train_captions.json")
    assert "resuming from" in train(ROOT, *again, tmp_path / "half")
    weights = [folder / "trained.safetensors" for folder in (tmp_path / "half", written / "trained")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert "nothing to do" in train(ROOT, *again, written / "trained")


def test_a_feature_cache_gives_the_same_training(old: Path, written: Path, tmp_path: Path):
    folders = {root: tmp_path / name for root, name in ((old, "before"), (ROOT, "now"))}
    for root, folder in folders.items():
        words = ("--image_aspect_ratio", "square", "--feature_cache", written / "cache")
        train(root, written / "scenes", "pretrain", "train_captions.json", folder, *words)
    weights = [(folder / "trained.safetensors").read_bytes() for folder in folders.values()]
    assert weights[0] == weights[1]


def test_answers_are_not_asked_for_again(written: Path):
    file = written / "lora" / "eval" / "results.json"
    before = json.loads(file.read_text())["benchmarks"]["scenes"]
    evaluate(ROOT, written)
    now = json.loads(file.read_text())["benchmarks"]["scenes"]
    assert [run["questions_answered"] for run in before.values()] != [0] * len(before)
    assert [run["questions_answered"] for run in now.values()] == [0] * len(now)
    assert [run["rows"] for run in now.values()] == [run["rows"] for run in before.values()]
