"""The multiple-choice questions of public benchmarks: options, keys, and what their rules share."""

import ast
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from string import punctuation
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.eval.fields import Field, Row, check_row
from tove_llava.eval.public_files import PublicBenchmark

#: an index of a table, also where it is written as text
INDEX = Field("a whole number", lambda value: type(value) is int or (isinstance(value, str) and value.isdecimal()))
CHOICES = Field(
    "a list of 2 to 26 texts",
    lambda value: isinstance(value, list) and 2 <= len(value) <= 26 and all(isinstance(each, str) for each in value),
)
_CAMBRIAN_MARKS = ("answer is", "answer is:", "answer:")


class ChoiceBenchmark(PublicBenchmark):
    """Rows with ``options`` (letter -> words) and ``answer``, a letter of these."""

    @abstractmethod
    def read(self, row: Mapping[str, Any], text: str) -> str | None:
        """Return what the benchmark's rule reads in an answer: a letter, or None."""

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        return float(self.read(row, text) == row["answer"])

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return self.read(row, text) in row["options"]


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Return options by their letters, A first."""
    return {chr(ord("A") + number): words for number, words in enumerate(options)}


def written_list(text: Any) -> Any:
    """Return the list of texts that a text writes in Python, else the value as it is; "[0, 1]" is an interval."""
    try:
        found = ast.literal_eval(text) if isinstance(text, str) and text.startswith("[") else text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return found if isinstance(found, list) and all(isinstance(each, str) for each in found) else text


def written_options(record: Row, place: str) -> dict[str, str]:
    """Return a record's options by letters, from a list or one written in Python."""
    return lettered(check_row({"options": written_list(record["options"])}, place, {"options": CHOICES})["options"])


def option_lines(options: Mapping[str, str]) -> str:
    return "\n".join(f"{letter}. {words}" for letter, words in options.items())


def key_letter(answer: Any, options: Mapping[str, str], place: str) -> str:
    """Return the letter of a key such as "(B)" or "B".

    Raises:
        DataError: it is none of the options' letters.
    """
    letter = str(answer).strip().strip("()").upper()
    if letter not in options:
        raise DataError(f"{place}: the answer {answer!r:.80} is no option; its letters: {', '.join(options) or 'none'}")
    return letter


def without_punctuation(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", punctuation))


def cambrian_answer(text: str, ends: str) -> str:
    """Return the words that Cambrian's scorers read, in lower case.

    Args:
        ends: characters that they drop from the right.
    """
    text = text.lower().strip()
    for mark in _CAMBRIAN_MARKS:
        text = text.rpartition(mark)[2]
    return text.strip().rstrip(ends).lstrip("(").rstrip(")")
