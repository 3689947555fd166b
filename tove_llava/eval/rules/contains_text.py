"""Containment, as OCRBench's authors count: a right answer occurs in the text."""

from collections.abc import Mapping
from typing import Any

from tove_llava.eval.rules import Rule, register_rule


def _flat(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


@register_rule("contains")
class ContainsText(Rule):
    """Right if one of the right answers occurs in the answer, in any case."""

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        return float(any(_flat(answer) in _flat(text) for answer in row["answers"]))
