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
from tove_llava.core.files import parse_json_lines, read_text, writing
from tove_llava.eval.fields import ID, Kinds, Row, check_row

T = TypeVar("T")


def read_jsonl(file: str | Path, required: Sequence[str] | Kinds = (), broken: list[int] | None = None) -> list[Row]:
    """Read all rows of a JSONL file.

    Args:
        file: UTF-8 file, one JSON object a line; empty lines are skipped.
        required: keys that every row must have; a mapping also gives the kinds of their values.
        broken: gets the numbers of lines that are not JSON, which are then left out; without it they are an error.

    Raises:
        DataError: the file is missing or not UTF-8, a line is not a JSON object, lacks a key, or has another
            kind of value there. The line is named.
    """
    rows = []
    if isinstance(required, Mapping):
        kinds = required
    else:
        kinds = {key: ID if key == "question_id" else object for key in required}
    hint = "mend the line, or delete it if it was cut off"
    for number, row in parse_json_lines(read_text(file), file, hint=hint, broken=broken):
        rows.append(check_row(row, f"{file}, line {number}", kinds))
    return rows


def read_truth(file: str | Path, kinds: Kinds) -> list[Row]:
    """Read ground truth, one row a line.

    Raises:
        DataError: as :func:`read_jsonl`; also for a file without any row.
    """
    rows = read_jsonl(file, kinds)
    if not rows:
        raise DataError(f"{file}: the ground truth holds no questions")
    return rows


def read_answers(file: str | Path, broken: list[int] | None = None) -> list[Row]:
    """Read a predictions file (``question_id`` and ``text`` in each row).

    Raises:
        DataError: as :func:`read_jsonl`; also for a file without any answer or an answer that is not a string.
    """
    rows = read_jsonl(file, required=("question_id", "text"), broken=broken)
    if not rows:
        reason = f"; line {broken[0]} is not valid JSON" if broken else ""
        raise DataError(f"{file} holds no answers{reason}")
    for row in rows:
        if not isinstance(row["text"], str):
            raise DataError(f"{file}: the answer to question {row['question_id']!r} is not a string: {row['text']!r}")
    return rows


class AppendFile:
    """A JSONL file of whole lines that survive a power cut.

    Opening it cuts off a last line that an earlier process did not finish.
    """

    def __init__(self, file: str | Path) -> None:
        self.path = Path(file)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                content = self.path.read_bytes()
                whole = content.rfind(b"\n") + 1
                if whole != len(content):
                    os.truncate(self.path, whole)
            self._handle = open(self.path, "ab", buffering=0)  # noqa: SIM115  (closed by __exit__)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows at once and wait until they are on disk."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
        with writing(self.path):
            while lines:
                lines = lines[self._handle.write(lines) :]
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
