"""JSONL: one JSON object a line."""

from pathlib import Path
from typing import Any

import numpy as np

from tove_llava.data.readers.base import READERS
from tove_llava.data.readers.json_slices import BLOCK, JsonSlices

_SUFFIXES = (".json", ".jsonl", ".ndjson")


@READERS.register_class("jsonl")
class JsonLines(JsonSlices):
    """Lines end only at ``\\n``; empty lines are skipped."""

    @classmethod
    def claims(cls, path: Path, head: bytes) -> bool:
        start = head.lstrip()[:1]
        return not path.is_dir() and start != b"[" and (start == b"{" or path.suffix.lower() in _SUFFIXES)

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        starts: list[Any] = []
        at = 0
        with path.open("rb") as handle:
            while block := handle.read(BLOCK) + handle.readline():  # whole lines
                begins = np.concatenate([[0], np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + 1])
                starts.append(_with_content(block, begins[begins < len(block)]) + at)
                at += len(block)
        self.bounds = np.concatenate([*starts, [at]]).astype(np.int64)


def _with_content(block: bytes, begins: Any) -> Any:
    """Drop the beginnings of empty lines."""
    first = np.frombuffer(block, np.uint8)[begins]
    for index in np.flatnonzero((first <= 32) | (first >= 128)):  # white space, or a byte-order mark
        end = block.find(b"\n", begins[index])
        line = block[begins[index] : len(block) if end < 0 else end]
        if not line.decode("utf-8-sig", "replace").strip():
            begins[index] = -1
    return begins[begins >= 0]
