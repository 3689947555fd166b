"""Answer, question and ground-truth files: read strictly, append durably.

LLaVA's answer line has ``question_id, prompt, text, answer_id, model_id, metadata``. Where an id occurs twice, the last
line counts.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tove_llava.core.errors import DataError
from tove_llava.core.files import parse_json_lines, read_text

Row = dict[str, Any]
T = TypeVar("T")


def read_jsonl(file: str | Path, required: Sequence[str] = (), broken: list[int] | None = None) -> list[Row]:
    """Read all rows of a JSONL file.

    Args:
        file: UTF-8 file, one JSON object a line; empty lines are skipped.
        required: keys that every row must have.
        broken: gets the numbers of lines that are not JSON, which are then left out; without it they are an error.

    Raises:
        DataError: the file is missing or not UTF-8, a line is not a JSON object or lacks a key. The line is named.
    """
    rows = []
    hint = "mend the line, or delete it if it was cut off"
    for number, row in parse_json_lines(read_text(file), file, hint=hint, broken=broken):
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number}: a JSON object is needed, found {type(row).__name__}")
        missing = [key for key in required if key not in row]
        if missing:
            raise DataError(f"{file}, line {number}: the key {missing[0]!r} is missing; it has {sorted(row)}")
        if "question_id" in required and not isinstance(row["question_id"], int | str):
            raise DataError(f"{file}, line {number}: question_id must be a number or a string: {row['question_id']!r}")
        rows.append(row)
    return rows


def read_answers(file: str | Path, broken: list[int] | None = None) -> list[Row]:
    """Read a predictions file (``question_id`` and ``text`` in each row).

    Raises:
        DataError: as :func:`read_jsonl`; also for a file without any answer or an answer that is not a string.
    """
    rows = read_jsonl(file, required=("question_id", "text"), broken=broken)
    if not rows:
        raise DataError(f"{file} holds no answers")
    for row in rows:
        if not isinstance(row["text"], str):
            raise DataError(f"{file}: the answer to question {row['question_id']!r} is not a string: {row['text']!r}")
    return rows


def require(rows: Iterable[Any], file: str | Path, keys: Mapping[str, Any]) -> list[Row]:
    """Check that ground-truth rows have these keys, of these types.

    Raises:
        DataError: there is no row, or one is not an object, lacks a key, or has a value of another type there.
    """
    checked = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{file}, record {number}: an object is needed, found {type(row).__name__}")
        for key, kind in keys.items():
            if key not in row:
                raise DataError(
                    f"{file}, record {number}: the key {key!r} is missing; it has {sorted(row)}. "
                    "Is it another benchmark's ground truth?"
                )
            if not isinstance(row[key], kind):
                raise DataError(f"{file}, record {number}: {key!r} has the wrong type: {row[key]!r:.80}")
        checked.append(row)
    if not checked:
        raise DataError(f"{file}: the ground truth holds no questions")
    return checked


class AppendFile:
    """A JSONL file of whole lines that survive a power cut.

    Opening it cuts off a last line that an earlier process did not finish.
    """

    def __init__(self, file: str | Path) -> None:
        self.path = Path(file)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole != len(content):
                os.truncate(self.path, whole)
        self._handle = open(self.path, "ab")  # noqa: SIM115  (closed by __exit__)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows at once and wait until they are on disk."""
        self._handle.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def __enter__(self) -> "AppendFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """Choose ``limit`` items (by default all) at even distances."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]
