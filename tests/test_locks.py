"""One process at a time writes a folder; the second is told who does."""

import fcntl
import json
import multiprocessing
import os
import re
import signal
import time

import pytest

from tove_llava.core import locks
from tove_llava.core.errors import BusyError, CheckpointError
from tove_llava.core.files import PARTIAL, staged
from tove_llava.core.locks import LOCK, is_locked, locked, locked_target, sweep

FORK = multiprocessing.get_context("fork")


def held_elsewhere(folder, ready, then=None):
    with locked(folder):
        if then is not None:
            then()
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run."""
    ready = FORK.Event()
    process = FORK.Process(target=held_elsewhere, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join(60)


def test_the_second_comer_is_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(BusyError) as caught, locked(tmp_path / "run"):
        pass
    host = re.escape(os.uname().nodename)
    assert re.search(rf"run is being written by process {holder.pid} on {host} since 2\d+-\d+-\d+ ", str(caught.value))
    assert is_locked(tmp_path / "run" / LOCK)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    assert not is_locked(tmp_path / "run" / LOCK), "the kernel releases it"
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_file_that_its_holder_just_removed_is_no_lock(tmp_path, monkeypatch):
    taken = []

    def too_late(descriptor):
        if not taken:
            (tmp_path / LOCK).unlink()
        taken.append(try_lock(descriptor))
        return taken[-1]

    try_lock = locks.try_lock
    monkeypatch.setattr(locks, "try_lock", too_late)
    with locked(tmp_path):
        monkeypatch.undo()
        assert len(taken) == 2 and is_locked(tmp_path / LOCK)


def test_what_a_living_writer_adds_is_not_swept_away(tmp_path, holder):
    (tmp_path / "run" / PARTIAL).mkdir()
    sweep(tmp_path / "run")
    assert (tmp_path / "run" / PARTIAL).is_dir()
    holder.kill()
    holder.join(60)
    sweep(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    ready, end = FORK.Event(), FORK.Event()

    def start_worker():
        if os.fork() == 0:
            end.wait(60)
            os._exit(0)

    holder = FORK.Process(target=held_elsewhere, args=(tmp_path / "run", ready, start_worker))
    holder.start()
    assert ready.wait(60)
    holder.kill()
    holder.join()  # with a time limit it would wait for the worker too
    with locked(tmp_path / "run"):
        end.set()


def test_only_what_the_lock_made_is_removed(tmp_path):
    (tmp_path / "there").mkdir()
    with locked(tmp_path / "there"), locked(tmp_path / "new/deep"):
        pass
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "kept/deep"):
        (tmp_path / "kept/answer").write_text("")
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["answer", "kept", "there"]
    with pytest.raises(CheckpointError, match="cannot be made"), locked(tmp_path / "kept/answer/x"):
        pass


def test_a_disk_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def refuse(descriptor, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "run"), locked(tmp_path / "run"), staged(tmp_path / "out") as stage:
        (stage / "file").write_text("")
    assert capsys.readouterr().err.count("no file locks on this disk") == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_folders_that_killed_writers_left_are_removed_and_those_of_others_stay(tmp_path):
    def write(ready):
        with staged(tmp_path / "out") as stage:
            (stage / "half").write_text("")
            ready.set()
            time.sleep(60)

    processes = []
    for _ in range(2):
        ready = FORK.Event()
        processes.append(FORK.Process(target=write, args=(ready,)))
        processes[-1].start()
        assert ready.wait(60)
    assert len(list(tmp_path.iterdir())) == 2
    processes[0].kill()
    processes[0].join(60)
    with staged(tmp_path / "out") as stage:
        assert len(list(tmp_path.iterdir())) == 2
        (stage / "file").write_text("")
    processes[1].kill()
    processes[1].join(60)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(CheckpointError, match="was written meanwhile"), staged(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_a_target_is_locked_by_a_file_next_to_it(tmp_path):
    with locked_target(tmp_path / "a/out"):
        with pytest.raises(BusyError, match="a/out is being written"), locked_target(tmp_path / "a/out"):
            pass
        with locked_target(tmp_path / "a/other"):
            assert not (tmp_path / "a/out").exists()
    assert list(tmp_path.iterdir()) == []
