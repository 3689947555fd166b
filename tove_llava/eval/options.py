"""Options of multiple-choice questions, read from the question's own text."""

import re
from string import ascii_uppercase

_LINE = re.compile(r"^([A-Z])\. ?(.*)$")  # "B. a red ball"
_INLINE = re.compile(r"\(([A-Z])\) (.*?)(?= \([A-Z]\) |\n|$)")  # "(A) blue (B) red"


def lettered_options(text: str) -> dict[str, str]:
    """Letter -> words of the options that a question lists, A first and none left out; empty where it lists none.

    They stand on lines of their own (``A. red``), as in LLaVA's question files, or in one line (``(A) red (B) blue``).
    """
    lines = [match.groups() for line in text.split("\n") if (match := _LINE.match(line.rstrip()))]
    for found in (lines, _INLINE.findall(text)):
        letters = "".join(letter for letter, _ in found)
        if len(found) > 1 and letters == ascii_uppercase[: len(found)]:
            return {letter: words.strip() for letter, words in found}
    return {}
