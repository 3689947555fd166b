"""Lock what one process writes, so that a second writer is refused.

The kernel releases a lock when its process ends. The file of the lock says who holds it.
"""

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from tove_llava.core.errors import BusyError, CheckpointError, ToveError
from tove_llava.core.files import PARTIAL, make_folders, remove_empty, try_lock
from tove_llava.core.json_text import loads

LOCK = ".tove_llava.lock"  # in a folder that grows; a folder that appears whole has one next to it
_PATIENCE = 1.0  # seconds: who only looks (is_locked) holds a lock too, for a moment
_held: set[int] = set()  # descriptors


@contextmanager
def locked(folder: str | os.PathLike[str], name: str = LOCK) -> Iterator[None]:
    """Lock a folder against other writers; make it where it is missing.

    The lock's file goes when the block ends, and so do the folders that were made and are still empty. A file system
    without locks is named, and nothing is locked.

    Args:
        name: of the lock's file in the folder.

    Raises:
        BusyError: another process holds the lock; the message names it.
        CheckpointError: the folder cannot be made, or no file in it.
    """
    folder, made = Path(folder), make_folders(folder)
    try:
        descriptor = _take(folder, name)
        _held.add(descriptor)
        try:
            yield
        finally:
            if descriptor in _held:  # else this is a forked process
                _held.remove(descriptor)
                with suppress(OSError):
                    os.unlink(folder / name)
                os.close(descriptor)
    finally:
        remove_empty(made)


def locked_target(out: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """Lock a folder that will appear whole, by a file next to it; as :func:`locked`."""
    target = Path(os.path.abspath(out))
    return locked(target.parent, f".{target.name}.lock")


def sweep(folder: Path) -> None:
    """Remove what a killed process left in a folder that it had just finished."""
    if (folder / LOCK).exists():
        with suppress(ToveError), locked(folder):
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def is_locked(file: Path) -> bool:
    """Tell if a process holds a lock's file."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        return try_lock(descriptor) is False
    finally:
        os.close(descriptor)


def hold(file: str | os.PathLike[str]) -> IO[bytes] | None:
    """Open and lock a file until it is closed, or its process and their children end; None if it is locked."""
    handle = open(file, "ab")  # noqa: SIM115 (the caller closes it)
    if try_lock(handle.fileno()) is False:
        handle.close()
        return None
    return handle


def _take(folder: Path, name: str) -> int:
    """Return a descriptor of the locked file, with this process's name in it."""
    file, end = folder / name, time.monotonic() + _PATIENCE
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error}") from error
        taken = try_lock(descriptor)
        if taken is False and time.monotonic() > end:
            what = folder if name == LOCK else folder / name[1 : -len(".lock")]
            holder = _holder(descriptor)
            os.close(descriptor)
            raise BusyError(f"{what} is being written by {holder}. Wait for its end, or choose another folder")
        if taken is None:
            print(f"{folder}: no file locks on this disk; do not write it twice at a time", file=sys.stderr)
        if taken is not False and _is_same(descriptor, file):
            break
        os.close(descriptor)  # held, or just removed by its holder
        time.sleep(0.05)
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    with suppress(OSError):  # a full disk: who holds the lock cannot be said
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(me).encode())
    return descriptor


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        holder = loads(os.pread(descriptor, 1000, 0))
        return "process {pid} on {host} since {since}".format(**holder)
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _leave_to_parent() -> None:
    """Close the locks in a forked process: they end with the process that took them."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
