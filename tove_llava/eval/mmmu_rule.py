"""The rules of MMMU's and MMMU-Pro's authors for reading an answer, without their random letters."""

import re
from collections.abc import Iterator, Mapping, Sequence

_ENDS = ",.!?;:'"
_WORDS = 5  # an answer with more may name an option by its words
_TRIVIAL = frozenset(":,.!?;'")
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
#: forms of a letter X, strongest first: one that must occur, and one whose last occurrence decides between several
FORMS = (("({})", "({})"), (" {} ", " {} "))
FORMS_PRO = (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))


def choice_of(text: str, options: Mapping[str, str], forms: Sequence[tuple[str, str]] = FORMS) -> str | None:
    """Return the letter that an answer names last, in the strongest form that occurs, or None.

    A long answer without a letter may hold an option's words.
    """
    for mark in _ENDS:
        text = text.strip(mark)
    text = f" {text} "
    for form, deciding in forms:
        if found := [letter for letter in options if form.format(letter) in text]:
            return max(found, key=lambda letter: text.rfind(deciding.format(letter)))
    if len(text.split()) <= _WORDS:
        return None
    places = {letter: text.lower().rfind(words.lower()) for letter, words in options.items()}
    last = max(places, key=lambda letter: places[letter])
    return last if places[last] >= 0 else None


def choice_of_pro(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter after the last "Answer:" if that is the only one, else as :func:`choice_of`."""
    _, mark, tail = text.rpartition("Answer:")
    named = [letter for letter in options if letter in tail] if mark else []
    return named[0] if len(named) == 1 else choice_of(text, options, FORMS_PRO)


def is_right(text: str, references: Sequence[str]) -> bool:
    """Tell if a free answer has the number, or holds the words, of a reference."""
    given = [form for candidate in _candidates(text) for form in _forms(candidate)]
    wanted = [form for reference in references for form in _forms(reference)]
    return any(
        answer in found if isinstance(answer, str) and isinstance(found, str) else answer == found
        for answer in wanted
        for found in given
    )


def _candidates(text: str) -> Iterator[str]:
    """Yield the parts of an answer that may be the result, and the numbers in them."""
    text = text.strip().strip(".").lower()
    *lines, last = text.split("\n")
    tails = [*(_tail(line, _KEYS) for line in lines), _tail(last, (*_KEYS, "="))]
    for tail in [tail for tail in tails if tail and tail not in _TRIVIAL] or [text]:
        yield tail
        for number in _NUMBERS:
            yield from number.findall(tail)


def _tail(line: str, keys: Sequence[str]) -> str:
    """Return the shortest text after one of the keys; empty if there is none."""
    shortest = ""
    for key in keys:
        if key in line:
            tail = line.rpartition(key)[2].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def _forms(text: str) -> list[str | float]:
    """Return a number rounded to two digits, or a text in lower case; a single character keeps a space on one side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
