"""Visual Spatial Reasoning (Liu et al. 2023, arXiv 2205.00363): statements about positions.

Layout: ``vsr/test.jsonl`` (the official records; without ids a record's number from 0 is its id) and ``vsr/images/``.
There is no official reading of free text. The rule here: the first whole word out of yes, true, no, false, in any
case, counts; an answer without one is wrong. Breakdowns by relation and by category of relations follow the authors'
``analysis_scripts``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import SHORT_ANSWER, Benchmark, Question, Score, register_benchmark
from tove_llava.eval.fields import TEXT, check_rows, one_of
from tove_llava.eval.rows import Row, read_truth
from tove_llava.eval.rules.yes_or_no import parse_answer
from tove_llava.eval.scorer_data import scorer_data


@register_benchmark("vsr")
class Vsr(Benchmark):
    """Accuracy, overall, per relation and per category of relations."""

    question_path = "vsr/test.jsonl"
    max_new_tokens = 128

    def questions(self, root: Path) -> list[Question]:
        file = self.question_file(root)
        return [
            Question(
                row["question_id"],
                f"Is the following statement about the image true or false? {row['caption']}\n{SHORT_ANSWER}",
                root / "vsr" / "images" / row["image"],
                {"relation": row["relation"]},
            )
            for row in check_rows(self.read_ground_truth(file), file, {"caption": TEXT, "image": TEXT})
        ]

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        rows = read_truth(file, {"label": one_of(0, 1), "relation": TEXT})
        return [{"question_id": number, **row} for number, row in enumerate(rows)]

    def groups(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        category = scorer_data("vsr_relations").get(row["relation"])
        return {"category": [category] if category else [], "relation": [row["relation"]]}

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return parse_answer(text) is not None

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        categories_of = scorer_data("vsr_relations")
        per_item: dict[Any, bool | None] = {}
        marks: dict[Any, float] = {}
        relations: dict[str, list[float]] = {}
        categories: dict[str, list[float]] = {}
        for row, text in zip(truth, matched.texts, strict=True):
            answer = None if text is None else parse_answer(text)
            mark = float(answer is not None and answer == bool(row["label"]))
            per_item[row["question_id"]] = answer
            marks[row["question_id"]] = mark
            relations.setdefault(row["relation"], []).append(mark)
            if row["relation"] in categories_of:
                categories.setdefault(categories_of[row["relation"]], []).append(mark)
        accuracy = mean(list(marks.values()))
        scores = {
            "accuracy": round(accuracy, 4),
            "correct": int(sum(marks.values())),
            "count": len(marks),
            "per_meta_category": _entries(categories),
            "per_relation": _entries(relations),
        }
        rows = {"accuracy": (100 * accuracy, len(marks))}
        rows |= {name: (100 * mean(values), len(values)) for name, values in sorted(categories.items())}
        extras = {
            "rows_without_meta_category": len(marks) - sum(len(values) for values in categories.values()),
            **matched.notes(),
        }
        return Score(scores, len(marks), rows, extras, {"per_item": per_item}, marks)


def _entries(groups: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Return each group's accuracy (4 digits, as printed) and size, largest first."""
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return {name: {"accuracy": round(mean(values), 4), "count": len(values)} for name, values in ordered}
