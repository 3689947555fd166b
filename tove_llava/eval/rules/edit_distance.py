"""Average normalised Levenshtein similarity (ANLS), as DocVQA's challenge computes it (arXiv 1905.13648)."""

from collections.abc import Mapping
from typing import Any

from tove_llava.eval.rules import Rule, register_rule

_LEAST = 0.5  # a smaller similarity is 0


def distance(first: str, second: str) -> int:
    """Return the Levenshtein distance: insertions, deletions and replacements."""
    previous = list(range(len(second) + 1))
    for row, a in enumerate(first, start=1):
        current = [row]
        for column, b in enumerate(second, start=1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (a != b)))
        previous = current
    return previous[-1]


def similarity(answer: str, right: str) -> float:
    """Return 1 less the distance per character.

    Distances are of lower-case texts with single spaces, lengths of the raw upper-case ones, as in the challenge.
    """
    length = max(len(answer.upper()), len(right.upper()))
    changes = distance(*(" ".join(text.lower().split()) for text in (answer, right)))
    return 1 - changes / length if length else 1.0


@register_rule("anls")
class EditDistance(Rule):
    """The similarity with the nearest right answer; below 0.5 it is 0."""

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        best = max(similarity(text, answer) for answer in row["answers"])
        return best if best >= _LEAST else 0.0
