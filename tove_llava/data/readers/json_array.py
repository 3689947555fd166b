"""JSON: one list of records, which is never held whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tove_llava.core.errors import DataError
from tove_llava.data.readers.base import HINT, READERS
from tove_llava.data.readers.json_slices import BLOCK, JsonSlices

_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_DEPTH = np.zeros(256, np.int8)
_DEPTH[list(b"[{")], _DEPTH[list(b"]}")] = 1, -1
_MARKS = (_DEPTH != 0) | (np.arange(256) == _COMMA)


@READERS.register_class("json_array")
class JsonArray(JsonSlices):
    """Elements of the outer list lie between commas that are in no string and no inner value."""

    separator = b","

    @classmethod
    def claims(cls, path: Path, head: bytes) -> bool:
        return head.lstrip().startswith(b"[")

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        found, at, depth, in_string = [], 0, 0, False
        first = last = -1
        for block in _blocks(path):
            data = np.frombuffer(block, np.uint8)
            outside, in_string = _outside_strings(data, in_string)
            marks = np.flatnonzero(_MARKS[data] & outside)
            kinds = data[marks]
            levels = depth + np.cumsum(_DEPTH[kinds], dtype=np.int64)
            if first < 0 and len(marks):
                first = at + int(marks[0])
            ends = marks[levels == 0]
            if last < 0 and len(ends):
                last = at + int(ends[0])
            found.append(marks[(levels == 1) & (kinds == _COMMA)] + at)
            depth = int(levels[-1]) if len(marks) else depth
            at += len(block)
        if last < 0:
            line = self._lines_before(at, b"") + 1
            raise DataError(f"{path}, line {line}: not valid JSON (the list does not end); {HINT}")
        if rest := self._read(last + 1, at).strip():
            line = self._lines_before(last + 1, rest) + 1
            raise DataError(f"{path}, line {line}: not valid JSON (text after the end of the list); {HINT}")
        self.bounds = np.concatenate([[first], *found, [last]]).astype(np.int64) + 1  # after each separator
        self.bounds[-1] -= 1
        if len(self) == 1 and not self._read(*map(int, self.bounds)).strip():
            self.bounds = self.bounds[:1]


def _blocks(path: Path) -> Iterator[bytes]:
    """Read a file in blocks that do not end with a backslash."""
    with path.open("rb") as handle:
        while block := handle.read(BLOCK):
            while block.endswith(b"\\") and (more := handle.read(1)):
                block += more
            yield block


def _outside_strings(data: Any, in_string: bool) -> tuple[Any, bool]:
    """Mark the bytes outside strings; tell if the block ends in one."""
    quotes = np.flatnonzero(data == _QUOTE)
    escaped, before = np.zeros(len(quotes), bool), quotes - 1
    live = np.arange(len(quotes))
    while len(live):  # an odd number of backslashes before a quote makes it a character of the string
        live = live[before[live] >= 0]
        live = live[data[before[live]] == _BACKSLASH]
        escaped[live] ^= True
        before[live] -= 1
    flips = np.zeros(len(data), np.uint8)
    flips[quotes[~escaped]] = 1
    inside = np.bitwise_xor.accumulate(flips) ^ in_string
    return inside == 0, bool(inside[-1])
