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

Row = dict[str, Any]
T = TypeVar("T")


def read_text(file: str | Path) -> str:
    """A UTF-8 file as it is (line ends are not translated; a byte order mark is dropped).

    Raises:
        DataError: the file is missing, a folder, or not UTF-8; in the last case the line is named.
    """
    path = Path(file)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; a file is needed") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason}); is the file whole?") from None


def read_json(file: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        DataError: as :func:`read_text`; also for a file that is not one JSON value. The line is named.
    """
    text = read_text(file)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = text.count("\n", 0, error.pos) + 1
        raise DataError(
            f"{file}, line {line}: not one JSON value ({error.msg}); is the file whole, and is it this benchmark's?"
        ) from None
    except RecursionError:
        raise DataError(f"{file}: JSON nested too deeply") from None


def read_jsonl(file: str | Path, required: Sequence[str] = (), broken: list[int] | None = None) -> list[Row]:
    """All rows of a JSONL file.

    Lines end at ``\\n`` only: answers may contain U+2028 and other characters that ``str.splitlines`` would cut at.

    Args:
        file: UTF-8 file, one JSON object a line; empty lines are skipped.
        required: keys that every row must have.
        broken: gets the numbers of lines that are not JSON, which are then left out; without it they are an error.

    Raises:
        DataError: the file is missing or not UTF-8, a line is not a JSON object or lacks a key. The line is named.
    """
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if broken is not None:
                broken.append(number)
                continue
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise DataError(
                f"{file}, line {number}: not valid JSON ({reason}); mend the line, or delete it if it was cut off"
            ) from None
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
    """Rows of a predictions file (``question_id`` and ``text`` in each).

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
    """The rows of a ground-truth file, each of which must have these keys, of these types.

    Args:
        keys: key -> type, or tuple of types, of its value.

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


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """``limit`` of the items at even distances (all, without a limit), so that every category has its share."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]
