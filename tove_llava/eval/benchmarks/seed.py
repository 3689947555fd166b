"""SEED-Bench (Li et al. 2023, arXiv 2307.16125): images and video frames.

LLaVA's layout: ``seed_bench/llava-seed-bench.jsonl`` (questions with the whole prompt; image names relative to
``seed_bench/``) and ``seed_bench/SEED-Bench.json``. Scores follow LLaVA's ``convert_seed_for_submission.py``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json
from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import Benchmark, Score, register_benchmark
from tove_llava.eval.fields import ID, WHOLE, Kinds, check_rows, one_of
from tove_llava.eval.rows import Row
from tove_llava.eval.server_files import Submission, Submitting, json_lines, known, require_all


def answer_id(key: str | int) -> str | int:
    """Return the id in LLaVA's answers, a number where possible."""
    try:
        return int(key)
    except ValueError:
        return key


@register_benchmark("seed")
class Seed(Benchmark, Submitting):
    """Share of exactly right letters: overall, images, videos, and per type."""

    question_path = "seed_bench/llava-seed-bench.jsonl"
    image_folder = "seed_bench"
    max_new_tokens = 128
    submission_suffix = ".jsonl"
    submission_size = 19_242

    def ground_truth(self, root: Path) -> list[Row]:
        return self.read_ground_truth(root / "seed_bench" / "SEED-Bench.json")

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        content = read_json(file)
        types = content.get("question_type") if isinstance(content, dict) else None
        if (
            not isinstance(types, dict)
            or not all(map(WHOLE.accepts, types.values()))
            or not isinstance(content.get("questions"), list)
        ):
            raise DataError(f"{file} has no 'question_type' and 'questions'; give SEED-Bench.json")
        names = {number: name for name, number in types.items()}
        keys: Kinds = {
            "question_id": ID,
            "answer": one_of(*"ABCD"),
            "data_type": str,
            "question_type_id": one_of(*names),
        }
        rows = check_rows(content["questions"], file, keys)
        for row in rows:
            choice = f"choice_{row['answer'].lower()}"
            if row.get(choice, choice) in (None, ""):
                raise DataError(f"{file}, question {row['question_id']!r}: the right answer's {choice!r} is empty")
        return [
            {
                "question_id": answer_id(row["question_id"]),
                "record_id": row["question_id"],
                "answer": row["answer"],
                "data_type": row["data_type"],
                "type": names[row["question_type_id"]],
                "type_id": row["question_type_id"],
            }
            for row in rows
        ]

    def mark_name(self, row: Mapping[str, Any]) -> Any:
        return row["record_id"]

    def groups(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        return {"data": [row["data_type"]], "type": [row["type"]]}

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return text in tuple("ABCD")

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        marks: dict[Any, float] = {}
        kinds: dict[str, list[float]] = {}
        types: dict[str, list[float]] = {row["type"]: [] for row in sorted(truth, key=lambda row: row["type_id"])}
        for row, text in zip(truth, matched.texts, strict=True):
            marks[self.mark_name(row)] = mark = float(text == row["answer"])
            kinds.setdefault(row["data_type"], []).append(mark)
            types[row["type"]].append(mark)
        scores: dict[str, Any] = {"total_percent": round(100 * mean(list(marks.values())), 2)}
        unavailable = {}
        for kind in ("image", "video"):
            if kind in kinds:
                scores[f"{kind}_percent"] = round(100 * mean(kinds[kind]), 2)
            else:
                unavailable[f"{kind}_percent"] = "the ground truth has no such question"
        scores["per_type_percent"] = {name: round(100 * mean(values), 2) for name, values in types.items()}
        extras = {
            "correct": int(sum(marks.values())),
            "count_per_type": {name: len(values) for name, values in types.items()},
            **matched.notes(),
        }
        rows = {"total": (100 * mean(list(marks.values())), len(marks))}
        rows |= {kind: (100 * mean(values), len(values)) for kind, values in sorted(kinds.items())}
        rows |= {name: (100 * mean(values), len(values)) for name, values in types.items()}
        return Score(scores, len(marks), rows, extras, {"per_item": marks}, marks, unavailable)

    def submission_questions(self, root: Path) -> Path:
        return root / "seed_bench" / "SEED-Bench.json"

    def submission(self, predictions: Sequence[Mapping[str, Any]], questions: Path | None) -> Submission:
        matched = self.pair(predictions, truth := self.read_ground_truth(known(questions)))
        require_all(matched.unanswered)
        rows = [
            {"question_id": row["record_id"], "prediction": text}
            for row, text in zip(truth, matched.texts, strict=True)
        ]
        return Submission(json_lines(rows), len(rows), matched.ids())
