"""Multiple choice: the letter that an answer names, as lmms-eval reads it for RealWorldQA and MMStar."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tove_llava.eval.benchmarks import OPTION_LETTER
from tove_llava.eval.rules import Rule, register_rule
from tove_llava.eval.rules.exact_match import normalise

_ENDS = ",.!?;:'\""
_PHRASE = re.compile(
    r"(?:answer is|answer:|answer choice is|choice is|option is|i choose|i select|i pick|would be|must be)",
    re.IGNORECASE,
)


def letter_of(text: str, letters: Iterable[str]) -> str | None:
    """Return the letter with the strongest mark, among equals the last; only capitals count.

    In falling order: the letter at the start, at the end, after a phrase such as "answer is", then ``(X)``, ``X.``,
    ``X:``, ``X)`` and ``X`` before a space, at last anywhere.
    """
    text = text.strip()
    for mark in _ENDS:
        text = text.strip(mark)
    found = [candidate for letter in letters for candidate in _candidates(f" {text} ", letter)]
    if found:
        return max(found)[2]
    places = {text.rfind(letter): letter for letter in letters if letter in text}
    return places[max(places)] if places else None


def _candidates(text: str, letter: str) -> Iterator[tuple[int, int, str]]:
    """Yield (weight, place, letter) of everything that names a letter."""
    bare = text.strip()
    if bare.startswith(letter) and not bare[1:2].isalpha():
        yield 10, 0, letter
    if bare.endswith(letter) and not bare[-2:-1].isalpha():
        yield 9, len(text), letter
    for phrase in _PHRASE.finditer(text):
        place = text.find(letter, phrase.end())
        if place >= 0:
            yield 7, place, letter
    for weight, form in (
        (6, f"({letter})"),
        (5, f"{letter}."),
        (4, f"{letter}:"),
        (3, f"{letter})"),
        (2, f"{letter} "),
    ):
        place = text.rfind(form)
        if place >= 0:
            yield weight, place, letter


@register_rule("choice")
class ChoiceLetter(Rule):
    """Right if the answer is the right option's words, or names its letter."""

    request = OPTION_LETTER
    needs_options = True

    def read(self, row: Mapping[str, Any], text: str) -> str | None:
        """Return the letter of an answer; options of one character have no words to go by."""
        words = [letter for letter, option in row["options"].items() if len(option) > 1]
        named = [letter for letter in words if normalise(row["options"][letter]) == normalise(text)]
        return named[0] if len(named) == 1 else letter_of(text, row["options"])

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return self.read(row, text) is not None

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        return float(self.read(row, text) in row["answers"])
