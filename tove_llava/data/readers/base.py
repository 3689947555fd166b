"""The contract of a reader of data files, and the registry of all."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.registry import Registry

HINT = "--data_path must be one JSON list, or one JSON object a line (.jsonl), or Parquet or Arrow files"
_HEAD_BYTES = 4096


class Reader(Sequence[Any], ABC):
    """A data file whose records are read when they are asked for.

    The constructor finds where records lie and keeps no more of each than a number. A reader can be pickled and used
    after a fork.

    Args:
        path: a file or folder that :meth:`claims` said yes to.

    Raises:
        DataError: the file is damaged; the message names it.
    """

    name: str = ""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @abstractmethod
    def claims(cls, path: Path, head: bytes) -> bool:
        """Tell if this reader reads a file or folder.

        Args:
            path: exists.
            head: the file's first bytes without a byte-order mark; empty for a folder.
        """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int) -> Any:
        """Read one record as plain data; an image's bytes may be a buffer.

        Raises:
            DataError: the record cannot be read; the message names the file and the record or line.
        """

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.row(each) for each in range(len(self))[index]]
        return self.row(range(len(self))[index])

    def __iter__(self) -> Iterator[Any]:
        return map(self.row, range(len(self)))


READERS: Registry[type[Reader]] = Registry("reader of data files", "tove_llava.data.readers")


def open_reader(path: str | os.PathLike[str]) -> Reader:
    """Open a data file with the reader that claims it.

    Raises:
        DataError: the file is missing, damaged, empty, or of a format that no reader knows.
    """
    path = Path(path)
    head = b""
    try:
        if not path.is_dir():
            with path.open("rb") as handle:
                head = handle.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}; {HINT}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; {HINT}") from error
    for name in READERS:
        reader = READERS.get(name)
        if reader.claims(path, head):
            opened = reader(path)
            if not len(opened):
                raise DataError(f"{path} holds no records")
            return opened
    what = "a folder without data files" if path.is_dir() else "of a format that cannot be read"
    raise DataError(f"{path} is {what} (known: {', '.join(READERS)}); {HINT}")
