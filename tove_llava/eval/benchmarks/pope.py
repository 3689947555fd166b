"""POPE (Li et al. 2023, arXiv 2305.10355): yes/no questions about objects.

The layout is LLaVA's: ``pope/llava_pope_test.jsonl`` (questions), ``pope/coco/coco_pope_<category>.json`` (labels, one
JSON object a line, in the questions' order) and ``pope/val2014/`` (images). Parsing and scores follow LLaVA's
``llava/eval/eval_pope.py``. The question file carries the whole prompt, with its request for a short answer.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.eval.benchmarks import Benchmark, Score, register_benchmark
from tove_llava.eval.fields import ID, TEXT, one_of
from tove_llava.eval.rows import Row, read_jsonl, read_truth

CATEGORIES = ("random", "popular", "adversarial")
# A text without any of these words is scored as "yes"; it counts as not read.
_WORD = re.compile(r"\b(?:yes|no|not)\b", re.IGNORECASE)
_LABEL = one_of("yes", "no")


def parse_answer(text: str) -> str:
    """Return "no" if the first sentence denies, else "yes".

    It denies with one of the words ``No``, ``no`` and ``not``, between single spaces; commas do not count. This is the
    official rule, with its quirks: an empty answer is "yes", and so is "no" before a line break.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "no", "not") for word in words) else "yes"


def _rates(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Score (label, answer) pairs; "yes" is positive, and undefined ratios are 0."""
    tp = pairs.count(("yes", "yes"))
    fp = pairs.count(("no", "yes"))
    tn = pairs.count(("no", "no"))
    fn = pairs.count(("yes", "no"))
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    return {
        "samples": len(pairs),
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "accuracy": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": (tp + fp) / len(pairs),
    }


@register_benchmark("pope")
class Pope(Benchmark):
    """Yes/no questions about objects in three categories of difficulty."""

    question_path = "pope/llava_pope_test.jsonl"
    image_folder = "pope/val2014"
    max_new_tokens = 128

    def ground_truth(self, root: Path) -> list[Row]:
        # Labels belong to questions by position within a category: the two files number them differently.
        questions = read_jsonl(self.question_file(root), {"question_id": ID, "category": TEXT})
        truth: list[Row] = []
        for category in dict.fromkeys(row["category"] for row in questions):
            file = root / "pope" / "coco" / f"coco_pope_{category}.json"
            labels = read_jsonl(file, {"image": TEXT, "label": _LABEL})
            asked = [row for row in questions if row["category"] == category]
            if len(labels) != len(asked):
                raise DataError(
                    f"{file} has {len(labels)} labels, but {self.question_file(root)} asks {len(asked)} questions of "
                    f"category {category!r}; both must come from the same release"
                )
            for question, label in zip(asked, labels, strict=True):
                if question.get("image", label["image"]) != label["image"]:
                    raise DataError(
                        f"{file}: the label for {label['image']!r} stands where question {question['question_id']!r} "
                        f"asks about {question['image']!r}; the files are in different orders"
                    )
                truth.append({**label, "question_id": question["question_id"], "category": category})
        return truth

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        return read_truth(file, {"question_id": ID, "label": _LABEL, "category": TEXT})

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return _WORD.search(text) is not None

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        pairs: dict[str, list[tuple[str, str]]] = {}
        per_item: dict[Any, str | None] = {}
        marks: dict[Any, float] = {}
        for row, text in zip(truth, matched.texts, strict=True):
            answer = None if text is None else parse_answer(text)
            per_item[row["question_id"]] = answer
            marks[row["question_id"]] = float(answer == row["label"])
            # An unanswered question stays in the count and is wrong.
            counted = answer or ("no" if row["label"] == "yes" else "yes")
            pairs.setdefault(row["category"], []).append((row["label"], counted))
        ordered = [name for name in CATEGORIES if name in pairs] + [name for name in pairs if name not in CATEGORIES]
        scores = {name: _rates(pairs[name]) for name in ordered}
        keys = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        mean = {key: sum(rates[key] for rates in scores.values()) / len(scores) for key in keys}
        rows = {
            f"{name} {key}": (100 * rates[key], int(rates["samples"]))
            for name, rates in scores.items()
            for key in ("accuracy", "f1")
        }
        rows |= {f"mean {key}": (100 * value, len(truth)) for key, value in mean.items()}
        extras = {"mean_of_categories": mean, **matched.notes()}
        return Score(scores, len(truth), rows, extras, {"per_item": per_item}, marks)
