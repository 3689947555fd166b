"""Files: written whole or not at all, read with precise errors."""

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tove_llava.core.errors import CheckpointError, DataError, ToveError
from tove_llava.core.json_text import JsonError, loads

PARTIAL = ".partial"  # a folder of what is being added to a folder


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``out``, unless the block fails.

    Those that killed processes left are removed.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    made = make_folders(out.parent)
    try:
        with writing(out), _locked_new(out, tempfile.mkdtemp) as stage:
            try:
                yield stage
                _settle(stage)
                if out.is_dir() and any(out.iterdir()):
                    raise CheckpointError(
                        f"{out} was written meanwhile by another process, and stays as it is; give --out a new folder, "
                        "or remove that one"
                    )
                os.replace(stage, out)
                sync(out.parent)
            except BaseException:
                shutil.rmtree(stage, ignore_errors=True)
                raise
    except BaseException:
        remove_empty(made)
        raise


@contextmanager
def adding(folder: Path, last: str) -> Iterator[Path]:
    """Yield a folder whose entries move into ``folder`` unless the block fails, ``last`` at the end.

    The caller has locked ``folder``: what a killed process left there is removed.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    stage = folder / PARTIAL
    shutil.rmtree(stage, ignore_errors=True)
    try:
        with writing(folder):
            stage.mkdir()
            yield stage
            _settle(stage)
            for entry in sorted(stage.iterdir(), key=lambda entry: entry.name == last):
                target = folder / entry.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(entry, target)
            sync(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _locked_new(final: Path, make: Callable[..., str]) -> Iterator[Path]:
    """Make and lock a file or folder next to ``final``; remove those whose process has ended."""
    prefix = f".{final.name}.partial-"
    for left in final.parent.glob(f"{glob.escape(prefix)}*"):
        with _opened(left) as descriptor:
            if descriptor is not None and try_lock(descriptor):
                _remove(left)
    while True:
        new = Path(make(prefix=prefix, dir=final.parent))
        with _opened(new) as descriptor:
            if descriptor is not None and try_lock(descriptor) is not False and new.exists():
                yield new
                return
        # Another process took it for a left one.


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """Open a file or folder; None if it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder; False if a process holds it, None on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn failed writes of the block into an error that names the path.

    Raises:
        CheckpointError: the disk is full or read-only, or a right is missing.
    """
    try:
        yield
    except ToveError:
        raise
    except Exception as error:
        reason = _write_failure(error)
        if reason is None:
            raise
        raise CheckpointError(
            f"{path} could not be written ({reason}). Make room on that disk, or choose a place on another one"
        ) from error


def _write_failure(error: Exception) -> str | None:
    """Return why a write failed, or None for another kind of error.

    tokenizers raises plain exceptions, and torch.save a RuntimeError.
    """
    if isinstance(error, OSError | SafetensorError) or "(os error " in str(error):
        return str(error)
    return "the disk may be full" if "inline_container" in str(error) else None


def check_writable(target: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if no file can be made where ``target`` is to be."""
    folder = next(place for place in (Path(target), *Path(target).absolute().parents) if place.is_dir())
    with writing(target), tempfile.TemporaryFile(dir=folder):
        pass


def make_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """Make a folder and return the new ones, the innermost first.

    Raises:
        CheckpointError: it cannot be made.
    """
    folder = Path(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remove_empty(made)
        raise CheckpointError(f"{folder} cannot be made ({error}); choose another place") from error
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove the folders that are still empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _settle(stage: Path) -> None:
    """Flush a folder's files to the disk, with the usual rights."""
    mask = _umask()
    for path in (*sorted(stage.rglob("*"), reverse=True), stage):
        # mkdtemp and safetensors give rights only to the owner.
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        sync(path)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(file: str | os.PathLike[str], content: str | bytes) -> None:
    """Replace a file's content whole: readers see old or new content.

    The folder is made where it is missing. Several processes may write the same file. What killed ones left is removed.

    Raises:
        CheckpointError: the file cannot be written; it is as it was.
    """
    path = Path(file)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_new(path, _new_file) as temporary:
            try:
                with open(temporary, "wb") as handle:
                    handle.write(content.encode("utf-8") if isinstance(content, str) else content)
                    handle.flush()
                    os.fsync(handle.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def _new_file(prefix: str, dir: Path) -> str:
    descriptor, name = tempfile.mkstemp(prefix=prefix, dir=dir)
    os.fchmod(descriptor, 0o666 & ~_umask())  # mkstemp gives rights only to the owner
    os.close(descriptor)
    return name


def read_text(file: str | os.PathLike[str], error: type[ToveError] = DataError, hint: str = "") -> str:
    """Read a UTF-8 file without its byte-order mark; line ends stay.

    Args:
        error: class of every error; its message names the file, and the line where there is one.
        hint: what to do about an error; ends its message.
    """
    path = Path(file)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise error(_message(f"there is no file {path}", hint)) from None
    except IsADirectoryError:
        raise error(_message(f"{path} is a folder; a file is needed", hint)) from None
    except OSError as cause:
        raise error(_message(f"{path} cannot be read: {cause}", hint)) from cause
    return decode_text(content, path, error, hint)


def decode_text(
    content: bytes, file: str | os.PathLike[str], error: type[ToveError] = DataError, hint: str = "", line: int = 1
) -> str:
    """Decode a file's UTF-8 content from ``line`` on; errors as in :func:`read_text`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line += content.count(b"\n", 0, cause.start)
        reason = "it is UTF-16; save it as UTF-8" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else cause.reason
        raise error(_message(f"{file}, line {line}: not UTF-8 text ({reason})", hint)) from None


def parse_json(
    text: str,
    file: str | os.PathLike[str],
    error: type[ToveError] = DataError,
    hint: str = "",
    line: int = 1,
    **options: bool,
) -> Any:
    """Parse a file's text from ``line`` on; errors as in :func:`read_text`.

    Args:
        options: see :func:`tove_llava.core.json_text.loads`.
    """
    try:
        return loads(text, **options)
    except JsonError as cause:
        where = f"{file}, line {line + cause.line - 1}"
        raise error(_message(f"{where}: not valid JSON ({cause})", hint)) from None


def parse_json_lines(
    text: str,
    file: str | os.PathLike[str],
    error: type[ToveError] = DataError,
    hint: str = "",
    broken: list[int] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield each line's number and JSON value; errors as in :func:`read_text`.

    Lines end only at ``\\n``: values may contain U+2028 and others at which ``str.splitlines`` would cut. Empty lines
    are skipped.

    Args:
        broken: gets the numbers of lines that are not JSON; without it they are an error.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, file, error, hint, number)
        except error:
            if broken is None:
                raise
            broken.append(number)
            continue
        yield number, value


def read_json(file: str | os.PathLike[str], error: type[ToveError] = DataError, hint: str = "", **options: bool) -> Any:
    """Read a JSON file; options as in :func:`parse_json`, errors as in :func:`read_text`."""
    return parse_json(read_text(file, error, hint), file, error, hint, **options)


def read_json_object(
    file: str | os.PathLike[str], error: type[ToveError] = CheckpointError, hint: str = "", **options: bool
) -> dict[str, Any]:
    """Read a JSON file of one object, as :func:`read_json` does."""
    value = read_json(file, error, hint, **options)
    if not isinstance(value, dict):
        raise error(_message(f"{file}: a JSON object is needed, not a {type(value).__name__}", hint))
    return value


def _message(text: str, hint: str) -> str:
    return f"{text}; {hint}" if hint else text
