"""JSONL answer and question files: read strictly, append durably.

LLaVA's answer line has ``question_id, prompt, text, answer_id, model_id, metadata``. Where an id occurs twice, the last
line counts.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tove_llava.errors import DataError

Row = dict[str, Any]
T = TypeVar("T")


def read_jsonl(file: str | Path, required: Sequence[str] = ()) -> list[Row]:
    """All rows of a JSONL file.

    Lines end at ``\\n`` only: answers may contain U+2028 and other characters that ``str.splitlines`` would cut at.

    Args:
        file: UTF-8 file, one JSON object a line; empty lines are skipped.
        required: keys that every row must have.

    Raises:
        DataError: the file is missing or not UTF-8, a line is not a JSON object or lacks a key. The line is named.
    """
    path = Path(file)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; a JSONL file is needed") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); a JSONL file is needed") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not valid JSON ({error.msg}); mend the line, or delete it if it was cut off"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a JSON object is needed, found {type(row).__name__}")
        missing = [key for key in required if key not in row]
        if missing:
            raise DataError(f"{path}, line {number}: the key {missing[0]!r} is missing; it has {sorted(row)}")
        rows.append(row)
    return rows


def read_answers(file: str | Path) -> list[Row]:
    """Rows of a predictions file (``question_id`` and ``text`` in each).

    Raises:
        DataError: as :func:`read_jsonl`; also for a file without any answer or an answer that is not a string.
    """
    rows = read_jsonl(file, required=("question_id", "text"))
    if not rows:
        raise DataError(f"{file} holds no answers")
    for row in rows:
        if not isinstance(row["text"], str):
            raise DataError(f"{file}: the answer to question {row['question_id']!r} is not a string: {row['text']!r}")
    return rows


def by_question(rows: Iterable[Mapping[str, Any]]) -> dict[Any, Mapping[str, Any]]:
    """Rows keyed by ``question_id``; the last of several counts."""
    return {row["question_id"]: row for row in rows}


def duplicated(rows: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Ids that occur more than once, in order of their second occurrence."""
    seen: set[Any] = set()
    twice: dict[Any, None] = {}
    for row in rows:
        if row["question_id"] in seen:
            twice[row["question_id"]] = None
        seen.add(row["question_id"])
    return list(twice)


def pair(
    truth: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]], use: Callable[[Any, str | None], T]
) -> list[T]:
    """Apply ``use(truth row, answer or None)`` to every question, in the ground truth's order.

    Raises:
        DataError: no prediction answers any of the questions (predictions of another benchmark).
    """
    answers = by_question(predictions)
    if truth and not any(row["question_id"] in answers for row in truth):
        raise DataError(
            "none of the predictions answers a question of this ground truth: is it another benchmark's? "
            f"(first ids: {next(iter(answers), None)!r} and {truth[0]['question_id']!r})"
        )
    return [use(row, answers[row["question_id"]]["text"] if row["question_id"] in answers else None) for row in truth]


class AppendFile:
    """A JSONL file that grows by whole lines which survive a kill or a power cut.

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
        """Write the rows in one go and wait until they are on disk."""
        self._handle.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def __enter__(self) -> "AppendFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()


def write_atomically(file: str | Path, text: str) -> None:
    """Replace a file's content; a reader sees the old or the new content, never a part."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
