"""GQA (Hudson and Manning 2019, arXiv 1902.09506): compositional questions about real images.

LLaVA's layout: ``gqa/llava_gqa_testdev_balanced.jsonl`` (questions with the whole prompt), ``gqa/data/images/`` and
``gqa/data/testdev_balanced_questions.json`` (also found under ``gqa/data/questions1.2/``, as GQA's archive unpacks).
Answers are converted as by LLaVA's ``convert_gqa_for_eval.py``; scores follow GQA's evaluation program. Its validity
and plausibility need a file of choices that the release lacks.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json
from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import Benchmark, Score, first_of, register_benchmark
from tove_llava.eval.fields import TEXT, Kinds, a_list, an_object, check_rows
from tove_llava.eval.rows import Row
from tove_llava.eval.server_files import Submission, Submitting

# Operations that put the final question and are no step of reasoning.
_QUERIES = ("exist", "query: name", "choose name")
_RECORD: Kinds = {
    "question": TEXT,
    "answer": TEXT,
    "isBalanced": bool,
    "types": an_object({"structural": str, "semantic": str}),
    "semantic": a_list(an_object({"operation": str, "argument": str}), least=0),
    "groups": dict,
}
_NO_CHOICES = "it needs GQA's choices file, which the release lacks"


def convert(text: str) -> str:
    """Return the answer in lower case, without final full stops."""
    return text.rstrip(".").lower()


def steps(program: Sequence[Mapping[str, Any]]) -> int:
    """Count the reasoning steps of a question's functional program."""
    operations = [f"{entry['operation']}: {entry['argument']}" for entry in program]
    return sum(not any(query in operation for query in _QUERIES) for operation in operations)


@register_benchmark("gqa")
class Gqa(Benchmark, Submitting):
    """Exact match over balanced questions, with breakdowns and distribution score."""

    question_path = "gqa/llava_gqa_testdev_balanced.jsonl"
    image_folder = "gqa/data/images"
    max_new_tokens = 128
    submission_size = 12_578

    def ground_truth(self, root: Path) -> list[Row]:
        return self.read_ground_truth(self.submission_questions(root))

    def submission_questions(self, root: Path) -> Path:
        data, name = root / "gqa" / "data", "testdev_balanced_questions.json"
        return first_of(data / name, data / "questions1.2" / name)

    def submission(self, predictions: Sequence[Mapping[str, Any]], questions: Path | None) -> Submission:
        notes = self.pair(predictions, self.read_ground_truth(questions)).ids() if questions else {}
        rows = [{"questionId": row["question_id"], "prediction": convert(row["text"])} for row in predictions]
        return Submission(json.dumps(rows).encode(), len(rows), notes)

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        content = read_json(file)
        if not isinstance(content, dict):
            raise DataError(f"{file} is no dictionary of questions by id; give GQA's question file")
        check_rows(content, file, _RECORD)
        return [{**row, "question_id": key} for key, row in content.items()]

    def groups(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        return {name: [key(row)] for name, key in _BREAKDOWNS.items()}

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        balanced = [(row, text) for row, text in zip(truth, matched.texts, strict=True) if row["isBalanced"]]
        if not balanced:
            raise DataError("the ground truth has no balanced question, over which GQA's scores are taken")
        marks: dict[Any, float] = {}
        groups: dict[str, dict[str, list[float]]] = {name: {} for name in _BREAKDOWNS}
        kinds: dict[str, list[float]] = {}
        golds: dict[str, Counter[str]] = {}
        answers: dict[str, Counter[str]] = {}
        for row, text in balanced:
            answer = None if text is None else convert(text)
            mark = float(answer == row["answer"])
            marks[row["question_id"]] = mark
            kinds.setdefault("open" if row["types"]["structural"] == "query" else "binary", []).append(mark)
            for name, key in _BREAKDOWNS.items():
                groups[name].setdefault(key(row), []).append(mark)
            group = row["groups"].get("global")
            if group is not None:
                golds.setdefault(group, Counter())[row["answer"]] += 1
                if answer is not None:
                    answers.setdefault(group, Counter())[answer] += 1
        scores = {"accuracy": 100 * mean(list(marks.values()))}
        unavailable = {"validity": _NO_CHOICES, "plausibility": _NO_CHOICES}
        for kind in ("binary", "open"):
            if kind in kinds:
                scores[kind] = 100 * mean(kinds[kind])
            else:
                unavailable[kind] = "the ground truth has no such question"
        if golds:
            scores["distribution"] = _distribution(golds, answers)
        else:
            unavailable["distribution"] = "no question of the ground truth belongs to a group"
        detailed = {
            name: {key: {"percent": 100 * mean(group[key]), "count": len(group[key])} for key in sorted(group)}
            for name, group in groups.items()
        }
        rows = {"accuracy": (scores["accuracy"], len(balanced))}
        rows |= {kind: (100 * mean(values), len(values)) for kind, values in sorted(kinds.items())}
        rows |= {name: (100 * mean(v), len(v)) for name, v in sorted(groups["accuracyPerStructuralType"].items())}
        left, unread = ([key for key in ids if key in marks] for ids in (matched.unanswered, matched.unparsed))
        notes = replace(matched, unanswered=left, unparsed=unread).notes()
        extras = {"count_balanced": len(balanced), "count_all": len(truth), "detailed": detailed, **notes}
        return Score(scores, len(balanced), rows, extras, {"per_item": marks}, marks, unavailable)


_BREAKDOWNS = {
    "accuracyPerStructuralType": lambda row: str(row["types"]["structural"]),
    "accuracyPerSemanticType": lambda row: str(row["types"]["semantic"]),
    "accuracyPerSteps": lambda row: str(steps(row["semantic"])),
    "accuracyPerLength": lambda row: str(len(row["question"].split())),
}


def _distribution(golds: Mapping[str, Counter[str]], answers: Mapping[str, Counter[str]]) -> float:
    """Return the weighted chi-square distance of right and given answers, / 100."""
    total = weighted = 0.0
    for group, gold in golds.items():
        given = answers.get(group, Counter())
        distance = sum((given[answer] - count) ** 2 / count for answer, count in gold.items())
        weighted += distance * gold.total()
        total += gold.total()
    return weighted / total / 100
