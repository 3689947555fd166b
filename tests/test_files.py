"""Files and folders that are there whole or not at all."""

import json
import os

import numpy as np
import pytest

from tove_llava.core import files
from tove_llava.core.errors import CheckpointError
from tove_llava.core.files import adding, staged, try_lock, write_atomically
from tove_llava.train import feature_stores, step_checkpoints
from tove_llava.train.feature_cache import write_json
from tove_llava.train.feature_stores import write_shard
from tove_llava.train.run_files import STAGING, complete
from tove_llava.train.step_checkpoints import publish

OLD, NEW = np.zeros((1, 2, 3), np.float32), np.ones((1, 2, 3), np.float32)
WRITERS = {
    "text": (lambda file: write_atomically(file, "old"), lambda file: write_atomically(file, "new")),
    "bytes": (lambda file: write_atomically(file, b"old"), lambda file: write_atomically(file, b"new")),
    "json": (lambda file: write_json(file, ["old"]), lambda file: write_json(file, ["new"])),
    "shard": (lambda file: write_shard(file, OLD, "float32"), lambda file: write_shard(file, NEW, "float32")),
}


class Killed(BaseException):
    """The process ends here."""


def die(*_, **__):
    raise Killed


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_has_its_old_content_until_the_new_one_is_whole(tmp_path, monkeypatch, kind):
    before, after = WRITERS[kind]
    file = tmp_path / "file"
    before(file)
    old = file.read_bytes()
    for module, name in ((os, "replace"), (files.os, "fsync"), (feature_stores, "save_file")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, die)
            if name == ("fsync" if kind == "shard" else "save_file"):
                continue  # this one does without it
            with pytest.raises(Killed):
                after(file)
        assert file.read_bytes() == old, name
    after(file)
    assert file.read_bytes() != old
    if kind == "json":
        assert json.loads(file.read_text()) == ["new"]


def test_a_folder_is_there_only_when_its_last_file_is(tmp_path, monkeypatch):
    out = tmp_path / "deep" / "out"
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        with pytest.raises((KeyboardInterrupt, CheckpointError)), staged(out) as stage:
            (stage / "first").write_text("1")
            assert not out.exists()
            raise error
        assert not list(tmp_path.iterdir()), "nothing is left behind"
    with monkeypatch.context() as patch, pytest.raises(Killed), staged(out) as stage:
        (stage / "first").write_text("1")
        patch.setattr(os, "replace", die)
    assert not out.exists()
    with staged(out) as stage:
        (stage / "first").write_text("1")
    assert (out / "first").read_text() == "1" and [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_that_another_process_wrote_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="written meanwhile by another process"), staged(out) as stage:
        (stage / "ours").write_text("1")
        out.mkdir()
        (out / "theirs").write_text("1")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_what_another_process_is_writing_stays_until_it_ends(tmp_path):
    theirs = tmp_path / ".file.partial-theirs"
    with open(theirs, "w") as handle:
        assert try_lock(handle.fileno())
        write_atomically(tmp_path / "file", "new")
        assert theirs.exists()
    write_atomically(tmp_path / "file", "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_last_entry_of_a_folder_moves_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(old.name), replace(old, new)))
    with adding(tmp_path, "a") as stage:
        for name in "abc":
            (stage / name).write_text("1")
    assert moved == ["b", "c", "a"]


def test_a_checkpoint_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    (staging := tmp_path / f"{STAGING}1").mkdir()
    (staging / "weights").write_text("1")
    seen, final = [], tmp_path / "checkpoint-1"
    monkeypatch.setattr(step_checkpoints, "sync", lambda path: seen.append((path.name, final.exists())))
    publish(staging, final, None)
    assert seen == [("weights", False), (staging.name, False), (tmp_path.name, True)]


@pytest.mark.parametrize(("keep", "left"), [(1, [12]), (2, [11, 12]), (None, [8, 9, 10, 11, 12])])
def test_as_many_checkpoints_stay_as_are_kept(tmp_path, keep, left):
    for step in range(8, 13):  # by number, not by name
        (staging := tmp_path / f"{STAGING}{step}").mkdir()
        (staging / "weights").write_text(str(step))
        publish(staging, tmp_path / f"checkpoint-{step}", keep)
    assert [int(path.name.rpartition("-")[2]) for path in complete(tmp_path)] == left
    assert len(list(tmp_path.iterdir())) == len(left)
