"""Yes or no: the first whole word out of yes, true, no and false counts, in any case."""

import re
from collections.abc import Mapping
from typing import Any

from tove_llava.eval.rules import Rule, register_rule

_WORD = re.compile(r"\b(?:(yes|true)|(no|false))\b", re.IGNORECASE)


def parse_answer(text: str) -> bool | None:
    """Return True, False, or None without any of the four words."""
    found = _WORD.search(text)
    return None if found is None else found.group(1) is not None


@register_rule("yes_no")
class YesOrNo(Rule):
    """Right if the answer's first such word says the same as the right answer."""

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return parse_answer(text) is not None

    def problem(self, row: Mapping[str, Any]) -> str | None:
        fine = all(answer.lower() in ("yes", "no", "true", "false") for answer in row["answers"])
        return None if fine else "the answer must be yes, no, true or false"

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        answer = parse_answer(text)
        return float(answer is not None and answer in map(parse_answer, row["answers"]))
