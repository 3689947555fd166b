"""Parquet: decoded once into an Arrow file, whose rows can be read in any order."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.data.readers.arrow_folder import ArrowRows, arrow
from tove_llava.data.readers.base import READERS

_ROWS = 256  # of a batch, all in memory while it is written


@READERS.register_class("parquet")
class Parquet(ArrowRows):
    """One Parquet file, or a folder of them.

    The Arrow files lie in ``tove_llava`` in the user's cache (``XDG_CACHE_HOME``, or ``~/.cache``). They are as large
    as the decoded data, and made again when a Parquet file changes.
    """

    @classmethod
    def claims(cls, path: Path, head: bytes) -> bool:
        return any(path.glob("*.parquet")) if path.is_dir() else head.startswith(b"PAR1")

    def find_files(self) -> list[Path]:
        files = sorted(self.path.glob("*.parquet")) if self.path.is_dir() else [self.path]
        return [_decoded(file) for file in files]


def _decoded(file: Path) -> Path:
    state = file.stat()
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tove_llava" / "parquet"
    target = cache / f"{file.stem}-{digest}.arrow"
    if not target.is_file():
        _decode(file, target)
    return target


def _decode(file: Path, target: Path) -> None:
    """Write a Parquet file's rows as Arrow; several processes may do it at the same time."""
    pa = arrow(file)
    try:
        source = pa.parquet.ParquetFile(file, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is damaged or cut short ({error}); make it again") from error
    temporary: Any = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(descriptor, "wb") as sink, pa.ipc.new_file(sink, source.schema_arrow) as writer:
            batches = source.iter_batches(batch_size=_ROWS)
            while (batch := _next(batches, file)) is not None:
                writer.write_batch(batch)
        os.replace(temporary, target)
    except OSError as error:
        raise DataError(
            f"{file} cannot be decoded into {target.parent} ({error}); make room there, or set XDG_CACHE_HOME to a "
            "folder with more"
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _next(batches: Any, file: Path) -> Any:
    pa = arrow(file)
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is damaged or cut short ({error}); make it again") from error
