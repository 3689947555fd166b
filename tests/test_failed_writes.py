"""An output that cannot be written is one error: early if nothing can be written, without leftovers on a full disk."""

import errno
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from answer_parts import save_model
from safetensors import SafetensorError
from train_parts import flags, write_inputs

from tove_llava.cli import main
from tove_llava.core.errors import CheckpointError
from tove_llava.core.files import writing
from tove_llava.llava import ToveLlavaForConditionalGeneration
from tove_llava.scenes.writer import Request, write_scenes
from tove_llava.tower import frozen

NOWHERE = "/proc/nowhere/out"  # no folder can be made there, by no user
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("writes"))
    save_model(folder)  # folder/model
    write_scenes(Request({"val": 4}), folder / "scenes")
    (folder / "answers.jsonl").write_text('{"question_id": 1, "text": "a"}\n')
    return folder


def words(root, verb, out):
    """A command of each verb that writes to ``out``."""
    model, data = ["--model", str(root / "model"), "--out", str(out)], ["--data", str(root / "captions.json")]
    images = ["--image-folder", str(root / "images")]
    scenes = ["--benchmark", "scenes", "--data-root", str(root / "scenes"), "--batch-size", "4", "--device", "cpu"]
    return {
        "train": flags(root, "finetune", out, "--save_strategy", "steps", "--save_steps", "2", "--deepspeed", "none"),
        "merge": ["--model", str(root / "model"), *flags(root, "merge", out)[:2], *flags(root, "merge", out)[4:]],
        "eval": [*model[:2], "--output", str(out), *scenes],
        "export": [*model, "--format", "remote-code"],
        "convert": [*model, "--to", "original"],
        "merge-lora": model,
        "detach": [*model, "--keep", "1", *data, *images],
        "contributions": [*model, *data, *images],
        "features": ["--preset", str(root / "preset.yaml"), *data, *images, "--out", str(out), "--shard-images", "2"],
        "scenes": ["--out", str(out), "--val", "12"],
        "submission": ["--benchmark", "gqa", "--predictions", str(root / "answers.jsonl"), "--out", f"{out}.json"],
        "report": [str(root / "model"), "--out", str(out)],
        "routing": [*model, "--image", str(next((root / "images").iterdir()))],
        "redundancy": [*model, *scenes],
    }[verb]


VERBS = (
    "train", "merge", "eval", "export", "convert", "merge-lora", "detach", "contributions", "features", "scenes",
    "submission", "report", "routing", "redundancy",
)  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("verb", VERBS)
def test_unwritable_output_is_named_before_weights_are_loaded(root, monkeypatch, capsys, verb):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(frozen, "load_clip", refuse)
    monkeypatch.setattr(ToveLlavaForConditionalGeneration, "__init__", refuse)
    assert main([verb, *words(root, verb, NOWHERE)]) == 2
    said = capsys.readouterr().err
    assert "/proc/nowhere" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        SafetensorError("Error while serializing: I/O error"),
        Exception("No space left on device (os error 28)"),  # of tokenizers
        RuntimeError("[enforce fail at inline_container.cc:671]"),  # of torch.save
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_write_of_any_library_names_the_file(error):
    with pytest.raises(CheckpointError, match="model could not be written"), writing("model"):
        raise error
    with pytest.raises(ValueError, match="no write"), writing("model"):
        raise ValueError("no write")


def test_full_disk_in_a_checkpoint_of_training(root, tmp_path, monkeypatch, capsys):
    real, calls = torch.save, []

    def save(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:  # in the second checkpoint
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", save)
        assert main(["train", *words(root, "train", tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "checkpoint-4 could not be written (the disk may be full)" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-2", "run.json"]
    assert main(["train", *words(root, "train", tmp_path / "out")]) == 0
    assert "resuming from" in capsys.readouterr().out


def test_full_disk_at_the_end_of_training(root, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise FULL

    with monkeypatch.context() as patched:
        patched.setattr("transformers.LlavaProcessor.save_pretrained", fail)
        assert main(["train", *words(root, "train", tmp_path / "out")]) == 2
    assert "out could not be written ([Errno 28] No space left on device). Make room" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-4", "run.json"]


def test_full_disk_in_an_evaluation_keeps_the_answers(root, tmp_path, monkeypatch, capsys):
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(1)
        if len(calls) == 4:
            raise FULL
        return real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        assert main(["eval", *words(root, "eval", tmp_path / "out")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert main(["eval", *words(root, "eval", tmp_path / "out")]) == 0
    names = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(names) == ["answers.jsonl", "items.jsonl", "result.json", "results.json", "run.json"]


@contextmanager
def small_disk(folder, kilobytes):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [8, 40, 200, 600])
@pytest.mark.parametrize("verb", ["train", "eval", "features", "scenes", "export", "submission"])
def test_a_small_disk(root, tmp_path, capsys, verb, kilobytes):
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        code = main([verb, *words(root, verb, disk / "out")])
        said = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in said
        assert code == 0 or "No space left" in said or "disk may be full" in said
        left = [path.name for path in disk.rglob(".*")]
        assert not [name for name in left if "partial" in name or "lock" in name or name.endswith(".tmp")]
        assert not list(disk.rglob("incomplete-*")) and not list(disk.rglob("*.part"))
