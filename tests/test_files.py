"""Files and folders that are there whole or not at all."""

import json
import os

import numpy as np
import pytest

from tove_llava.core import files
from tove_llava.core.errors import CheckpointError
from tove_llava.core.files import staged, write_atomically
from tove_llava.train import feature_stores
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


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (None, [1, 2, 3, 4, 5])])
def test_as_many_checkpoints_stay_as_are_kept(tmp_path, keep, left):
    for step in range(1, 6):
        (staging := tmp_path / f"{STAGING}{step}").mkdir()
        (staging / "weights").write_text(str(step))
        publish(staging, tmp_path / f"checkpoint-{step}", keep)
    assert [int(path.name.rpartition("-")[2]) for path in complete(tmp_path)] == left
    assert len(list(tmp_path.iterdir())) == len(left)
