"""Files and folders that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from tove_llava.core.errors import CheckpointError


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out`` that becomes ``out`` when the block ends well, and is removed when it does not.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    made = [parent for parent in out.parents if not parent.exists()]  # the innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        _remove_empty(made)
        raise CheckpointError(f"cannot write beside {out}: {error}") from error
    try:
        yield stage
        mask = _umask()
        for path in (*sorted(stage.rglob("*"), reverse=True), stage):
            # mkdtemp and safetensors give the owner alone rights.
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
            sync(path)
        os.replace(stage, out)
        sync(out.parent)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        _remove_empty(made)
        if isinstance(error, (OSError, SafetensorError)):
            raise CheckpointError(
                f"{out} could not be written ({error}); nothing was left behind. Make room on that disk, or give --out "
                "a folder on another one"
            ) from error
        raise


def _remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders that were made for nothing; those that hold anything by now stay."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(file: str | os.PathLike[str], content: str | bytes) -> None:
    """Replace a file's content; a reader sees the old or the new content, never a part.

    The folder is made where it is missing. Several processes may write the same file.
    """
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as handle:
        handle.write(content.encode("utf-8") if isinstance(content, str) else content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
