"""Read JSON values that lie one after the other in a file."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from tove_llava.core.errors import DataError
from tove_llava.core.files import decode_text, parse_json
from tove_llava.data.readers.base import HINT, Reader

BLOCK = 1 << 22  # bytes


class JsonSlices(Reader):
    """JSON values between known offsets; eight bytes of memory each.

    Attributes:
        bounds: int64 [records + 1]; record ``i`` lies between two neighbours, with white space and separators.
        separator: ends a value and belongs to none.
    """

    bounds: np.ndarray[Any, Any]
    separator = b""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._descriptor: int | None = None
        state = os.stat(path)
        self._state = (state.st_size, state.st_mtime_ns)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}  # another process opens the file itself

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, index: int) -> Any:
        start, stop = int(self.bounds[index]), int(self.bounds[index + 1])
        content = self._read(start, stop).removesuffix(self.separator).strip()
        try:
            return self._parse(content, 1)
        except DataError:  # once more with the line's number, which takes a pass over the file
            return self._parse(content, 1 + self._lines_before(start, content))

    def _parse(self, content: bytes, line: int) -> Any:
        text = decode_text(content, self.path, DataError, HINT, line)
        return parse_json(text, self.path, DataError, HINT, line, unique=False)

    def _read(self, start: int, stop: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        state = os.fstat(self._descriptor)
        content = os.pread(self._descriptor, stop - start, start)
        if (state.st_size, state.st_mtime_ns) != self._state or len(content) != stop - start:
            raise DataError(f"{self.path} has changed since it was opened; start again")
        return content

    def _lines_before(self, start: int, content: bytes) -> int:
        """Count the lines before a value whose surroundings begin at ``start``."""
        lines = 0
        with self.path.open("rb") as handle:
            for at in range(0, start, BLOCK):
                lines += handle.read(min(BLOCK, start - at)).count(b"\n")
            head = handle.read(BLOCK)
        return lines + head[: max(head.find(content[:BLOCK]), 0)].count(b"\n")
