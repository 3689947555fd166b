"""Files: written whole or not at all, read with precise errors."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from tove_llava.core.errors import CheckpointError, DataError, ToveError
from tove_llava.core.json_text import JsonError, loads


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``out``, unless the block fails.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    made = [parent for parent in out.parents if not parent.exists()]  # the innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        _remove_empty(made)
        raise CheckpointError(f"cannot write next to {out}: {error}") from error
    try:
        yield stage
        mask = _umask()
        for path in (*sorted(stage.rglob("*"), reverse=True), stage):
            # mkdtemp and safetensors give rights only to the owner.
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
    """Remove the folders that are still empty."""
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
    """Replace a file's content whole: readers see old or new content.

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


def hold(file: str | os.PathLike[str]) -> IO[bytes] | None:
    """Open and lock a file until it is closed, or its process and their children end; None if it is locked."""
    handle = open(file, "ab")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    except OSError:
        pass  # a file system without locks
    return handle


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
