"""Exact match, but for case, spaces and a full stop at the end."""

from collections.abc import Mapping
from typing import Any

from tove_llava.eval.rules import Rule, register_rule


def normalise(text: str) -> str:
    """Write in lower case, with single spaces, without final full stops."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


@register_rule("exact")
class ExactMatch(Rule):
    """Right if the answer equals one of the right ones."""

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        return float(normalise(text) in map(normalise, row["answers"]))
