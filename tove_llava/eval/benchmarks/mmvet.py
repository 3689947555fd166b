"""MM-Vet (Yu et al. 2023, arXiv 2308.02490): answers that a judge grades.

LLaVA's layout: ``mm-vet/llava-mm-vet.jsonl`` (questions), ``mm-vet/images/`` and MM-Vet's own ``mm-vet/mm-vet.json``,
which is also the ground truth for ``tove-llava score``. Requests, repeated requests and sums follow
``mm-vet_evaluator.ipynb`` with one run (the paper takes the mean of five).
"""

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json
from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import Score, register_benchmark
from tove_llava.eval.fields import TEXT, a_list, check_rows
from tove_llava.eval.judge import Exchange, Judge, JudgedBenchmark, Request, verdict_line
from tove_llava.eval.rows import Row
from tove_llava.eval.scorer_data import scorer_data
from tove_llava.eval.server_files import Submission, Submitting

_PREFIX = "v1_"  # MM-Vet's ids are LLaVA's with this in front
_MAX_TOKENS = 3
_MORE_TOKENS = 1024  # of repeated requests: for judges that think or explain
_GRADE = re.compile(r"(\d*\.?\d+)(?![\d.]*\d)(?:\s*/\s*1(?:\.0)?)?(?=[\s.,;:)(]|$)")
_TEMPERATURES = (0.0, 0.5, 1.0, 1.5)  # of the repeated requests; after them the score is 0


def parse_grade(reply: str, cut: bool = False) -> float | None:
    """Read a number from 0 to 1: before the first space, as MM-Vet does, else at the start of the verdict's line.

    Args:
        cut: the reply may have ended early, so that "Score: 0" is no grade.
    """
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        found = _GRADE.match(verdict_line(reply))
        if found is None or (cut and reply.rstrip(".").endswith((" 0", " 1"))):
            return None
        grade = float(found.group(1))
    return grade if 0.0 <= grade <= 1.0 else None


def conversation(row: Mapping[str, Any], answer: str) -> Exchange[float | None]:
    """Ask for a grade, at rising temperatures and with more room while it is unreadable."""
    fixed = scorer_data("mmvet")
    truth = row["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    text = fixed["prompt"] + "\n" + " | ".join([row["question"], truth, answer, ""])
    grade = parse_grade((yield _request(text, 0.0, _MAX_TOKENS)), cut=True)
    for temperature in _TEMPERATURES:
        if grade is not None:
            return grade
        grade = parse_grade((yield _request(text + fixed["again"], temperature, _MORE_TOKENS)))
    return grade


def _request(text: str, temperature: float, max_tokens: int) -> Request:
    return Request(({"role": "user", "content": text},), temperature, max_tokens)


@register_benchmark("mmvet")
class MmVet(JudgedBenchmark, Submitting):
    """Mean grade, percent: over all, per capability and per combination of capabilities."""

    question_path = "mm-vet/llava-mm-vet.jsonl"
    image_folder = "mm-vet/images"
    submission_size = 218

    def ground_truth(self, root: Path) -> list[Row]:
        return self.read_ground_truth(root / "mm-vet" / "mm-vet.json")

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        content = read_json(file)
        if not isinstance(content, dict):
            raise DataError(f"{file} is no dictionary of questions by id; give mm-vet.json")
        rows = check_rows(content, file, {"question": TEXT, "answer": TEXT, "capability": a_list(TEXT)})
        return [{**row, "question_id": key} for key, row in zip(content, rows, strict=True)]

    def answer_key(self, row: Mapping[str, Any]) -> Hashable:
        return str(row["question_id"]).removeprefix(_PREFIX)

    def truth_key(self, row: Mapping[str, Any]) -> Hashable:
        return str(row["question_id"]).removeprefix(_PREFIX)

    def groups(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        return {"capability": sorted({str(name) for name in row["capability"]})}

    def verdicts(self, judge: Judge, truth: Sequence[Mapping[str, Any]], texts: Sequence[str | None]) -> Score:
        asked = [(row, text) for row, text in zip(truth, texts, strict=True) if text is not None]
        grades = judge.hold([conversation(row, text) for row, text in asked])
        marks: dict[Any, float] = {row["question_id"]: 0.0 for row in truth}  # a missing answer is wrong
        judged = {row["question_id"]: grade for (row, _), grade in zip(asked, grades, strict=True)}
        marks |= {key: grade or 0.0 for key, grade in judged.items()}
        capabilities: dict[str, list[float]] = {}
        combinations: dict[str, list[float]] = {}
        for row in truth:
            names = sorted({str(name) for name in row["capability"]})
            for name in names:
                capabilities.setdefault(name, []).append(marks[row["question_id"]])
            combinations.setdefault("_".join(names), []).append(marks[row["question_id"]])
        scores = {
            "total": _percent(list(marks.values())),
            "capabilities": {name: _percent(values) for name, values in sorted(capabilities.items())},
            "combinations": {name: _percent(values) for name, values in sorted(combinations.items())},
        }
        rows = {"total": (100 * mean(list(marks.values())), len(marks))}
        rows |= {name: (100 * mean(values), len(values)) for name, values in sorted(capabilities.items())}
        unread = [key for key, grade in judged.items() if grade is None]
        return Score(scores, len(truth), rows, {"unparsed_replies": unread}, {"per_item": marks}, marks)

    def submission_questions(self, root: Path) -> Path:
        return root / "mm-vet" / "mm-vet.json"

    def submission(self, predictions: Sequence[Mapping[str, Any]], questions: Path | None) -> Submission:
        notes = self.pair(predictions, self.read_ground_truth(questions)).ids() if questions else {}
        answers = {f"{_PREFIX}{self.answer_key(row)}": row["text"] for row in predictions}
        return Submission(json.dumps(answers, indent=2).encode(), len(answers), notes)


def _percent(values: Sequence[float]) -> float:
    """Round as MM-Vet reports."""
    return round(100 * mean(values), 1)
