"""Relaxed accuracy (ChartQA, Masry et al. 2022, arXiv 2203.10244), as lmms-eval and pix2struct compute it."""

from collections.abc import Mapping
from typing import Any

from tove_llava.eval.rules import Rule, register_rule

_TOLERANCE = 0.05


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def is_close(answer: str, right: str) -> bool:
    """Compare numbers with a tolerance of 5 %, and other texts in any case.

    A right answer of zero is compared as a text.
    """
    given, wanted = _number(answer), _number(right)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= _TOLERANCE
    return answer.lower() == right.lower()


@register_rule("relaxed")
class RelaxedAccuracy(Rule):
    """Right if the answer is near one of the right numbers, or equals one of the right texts."""

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        return float(any(is_close(text.strip(), answer) for answer in row["answers"]))
