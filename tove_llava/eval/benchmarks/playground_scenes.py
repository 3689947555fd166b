"""Held-out playground scenes: exact-match accuracy, overall and per question category.

``tove-llava scenes`` writes ``val_questions.jsonl`` (``question_id, image, text, answer, category``) and ``images/``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tove_llava.eval.benchmarks import register_benchmark
from tove_llava.eval.fields import ID, TEXT
from tove_llava.eval.rows import Row, read_truth
from tove_llava.eval.rules import MarkedBenchmark
from tove_llava.eval.rules.exact_match import ExactMatch


@register_benchmark("scenes")
class Scenes(MarkedBenchmark):
    """Questions with one short right answer about generated scenes."""

    question_path = "val_questions.jsonl"
    image_folder = "images"
    max_new_tokens = 16
    marking = ExactMatch()

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        return read_truth(file, {"question_id": ID, "answer": (str, int), "category": TEXT})

    def known(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**row, "answers": [str(row["answer"])]}
