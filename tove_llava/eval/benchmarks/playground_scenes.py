"""Held-out playground scenes: exact-match accuracy, overall and per question category.

``tove-llava scenes`` writes ``val_questions.jsonl`` (``question_id, image, text, answer, category``) and ``images/``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.eval.benchmarks import Benchmark, Score, register_benchmark
from tove_llava.eval.fields import ID, TEXT
from tove_llava.eval.rows import Row, read_truth


def normalise(text: str) -> str:
    """Write in lower case, with single spaces, without final full stops."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


@register_benchmark("scenes")
class Scenes(Benchmark):
    """Questions with one short right answer about generated scenes."""

    question_path = "val_questions.jsonl"
    image_folder = "images"
    max_new_tokens = 16

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        return read_truth(file, {"question_id": ID, "answer": (str, int), "category": TEXT})

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        marks = {
            row["question_id"]: float(text is not None and normalise(text) == normalise(str(row["answer"])))
            for row, text in zip(truth, matched.texts, strict=True)
        }
        groups: dict[str, list[float]] = {}
        for row in truth:
            groups.setdefault(row["category"], []).append(marks[row["question_id"]])
        scores: dict[str, Any] = {
            name: {"accuracy": sum(groups[name]) / len(groups[name]), "samples": len(groups[name])}
            for name in sorted(groups)
        }
        scores["overall"] = {"accuracy": sum(marks.values()) / len(marks), "samples": len(marks)}
        rows = {name: (100 * entry["accuracy"], entry["samples"]) for name, entry in scores.items()}
        return Score(scores, len(marks), rows, matched.notes(), {"per_item": marks}, marks)
