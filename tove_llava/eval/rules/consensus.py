"""The official VQA evaluation: agreement with ten people."""

from collections.abc import Mapping
from typing import Any

from tove_llava.eval.fields import ANNOTATORS
from tove_llava.eval.rules import Rule, register_rule
from tove_llava.eval.vqa import vqa_accuracy


@register_rule("vqa")
class Consensus(Rule):
    """The share of people that agree, three of them being enough."""

    least_answers = ANNOTATORS

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        return vqa_accuracy(text, [{"answer": text, "answer_id": index} for index, text in enumerate(row["answers"])])
