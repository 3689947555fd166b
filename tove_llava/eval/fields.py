"""Fields of question and ground-truth rows: their types and values, declared once.

A benchmark declares ``{key: kind}``, where a kind is a type, a tuple of types, or a :class:`Field`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """A check of one value; ``words`` say what is right."""

    words: str
    accepts: Callable[[Any], bool]


Kind = type | tuple[type, ...] | Field
Kinds = Mapping[str, Kind]


_NAMES = {
    str: "a string",
    int: "a whole number",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    type(None): "null",
}


def _fits(value: Any, kind: Kind) -> bool:
    return kind.accepts(value) if isinstance(kind, Field) else isinstance(value, kind)


def _words(kind: Kind) -> str:
    if isinstance(kind, Field):
        return kind.words
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(_NAMES.get(each, each.__name__) for each in kinds)


def one_of(*values: Any) -> Field:
    """Accept these values; True is not 1."""
    known = [(type(value), value) for value in values]
    *first, last = map(str, values)
    return Field(f"{', '.join(first)} or {last}" if first else last, lambda value: (type(value), value) in known)


def a_list(kind: Kind, least: int = 1) -> Field:
    """Accept a list of at least ``least`` values of a kind."""
    return Field(
        f"a list of at least {least}, each {_words(kind)}",
        lambda value: isinstance(value, list) and len(value) >= least and all(_fits(each, kind) for each in value),
    )


def an_object(kinds: Kinds) -> Field:
    """Accept an object that has these keys, of these kinds."""
    words = ", ".join(f"{key!r} ({_words(kind)})" for key, kind in kinds.items())
    return Field(
        f"an object with {words}",
        lambda value: (
            isinstance(value, dict) and all(key in value and _fits(value[key], k) for key, k in kinds.items())
        ),
    )


ID = Field("a number or a string", lambda value: type(value) in (int, str))
TEXT = Field("a string that is not blank", lambda value: isinstance(value, str) and bool(value.strip()))
WHOLE = Field("a whole number", lambda value: type(value) is int)
ANNOTATORS = 10  # whose answers a consensus compares
TEN_TEXTS = a_list(str, ANNOTATORS)
TEN_ANSWERS = a_list(an_object({"answer": str}), ANNOTATORS)


def check_row(row: Any, place: str, kinds: Kinds) -> Row:
    """Return a row that has these keys, of these kinds.

    Args:
        place: file and row, for the message.

    Raises:
        DataError: the row is no object, lacks a key, or has another kind of value there.
    """
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON object is needed, found {type(row).__name__}")
    for key, kind in kinds.items():
        if key not in row:
            raise DataError(
                f"{place}: the key {key!r} is missing; it has {sorted(map(str, row))}. Is it another benchmark's file?"
            )
        if not _fits(row[key], kind):
            name = f" (question {row['question_id']!r})" if "question_id" in row and key != "question_id" else ""
            raise DataError(f"{place}{name}: {key!r} must be {_words(kind)}, not {row[key]!r:.80}")
    return row


def check_rows(rows: Iterable[Any] | Mapping[Any, Any], file: str | Path, kinds: Kinds) -> list[Row]:
    """Return the rows of a file, each checked by :func:`check_row`.

    Args:
        rows: a list, whose records are numbered from 1 in messages, or a mapping, whose keys name them.

    Raises:
        DataError: there is no row, or one is wrong.
    """
    named = rows.items() if isinstance(rows, Mapping) else enumerate(rows, start=1)
    checked = [check_row(row, f"{file}, record {name!r}", kinds) for name, row in named]
    if not checked:
        raise DataError(f"{file}: the ground truth holds no questions")
    return checked
