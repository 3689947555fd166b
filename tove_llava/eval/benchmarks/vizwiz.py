"""VizWiz-VQA (Gurari et al. 2018, arXiv 1802.08218): blind people's questions.

LLaVA's layout: ``vizwiz/llava_test.jsonl`` (questions with the whole prompt) and ``vizwiz/test/``. The test answers are
not public: the server scores them. For the validation split, ``tove-llava score`` reads the official annotation file,
or JSONL with one of its records a line.

Two public programs disagree. LLaVA's text evaluator normalises both sides and takes "unanswerable" as an answer like
any other; the challenge's own API leaves the references as they are, and also rates the detection of unanswerable
questions.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json
from tove_llava.eval.agreement import agreement, mean
from tove_llava.eval.benchmarks import Benchmark, Score, register_benchmark
from tove_llava.eval.fields import TEN_ANSWERS, TEXT, Kinds, check_rows, one_of
from tove_llava.eval.normalisation import normalise_evalai, normalise_vizwiz
from tove_llava.eval.rows import Row, read_truth
from tove_llava.eval.server_files import Submission, Submitting, normalised_answers

M4C, API = "m4c", "api"
_RECORD: Kinds = {"image": TEXT, "answers": TEN_ANSWERS, "answer_type": str, "answerable": one_of(0, 1)}


@register_benchmark("vizwiz")
class VizWiz(Benchmark, Submitting):
    """Consensus accuracy: overall, per answer type, answerable and unanswerable questions."""

    question_path = "vizwiz/llava_test.jsonl"
    image_folder = "vizwiz/test"
    max_new_tokens = 128
    submission_size = 8_000
    rules = {
        M4C: "LLaVA's text evaluator: answers and references normalised",
        API: "the VizWiz challenge API: only answers normalised; with average precision and F1 of 'unanswerable'",
    }

    def ground_truth(self, root: Path) -> list[Row] | None:
        return None

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        if Path(file).suffix == ".jsonl":
            rows = read_truth(file, _RECORD)
        else:
            content = read_json(file)
            if not isinstance(content, list):
                raise DataError(f"{file} is no list of records; give VizWiz's annotation file")
            rows = check_rows(content, file, _RECORD)
        for row in rows:
            row.setdefault("question_id", _number(row["image"], file))
        return rows

    def groups(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        return {"answer type": [row["answer_type"]]}

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        judge = {M4C: _by_m4c, API: _by_api}[self.rule or M4C]
        marks: dict[Any, float] = {}
        types: dict[str, list[float]] = {}
        halves: dict[bool, list[float]] = {}
        for row, text in zip(truth, matched.texts, strict=True):
            references = [record["answer"] for record in row["answers"]]
            mark = 0.0 if text is None else judge(text, references)
            marks[row["question_id"]] = mark
            types.setdefault(row["answer_type"], []).append(mark)
            halves.setdefault(bool(row["answerable"]), []).append(mark)
        accuracy = mean(list(marks.values()))
        scores: dict[str, Any] = {"accuracy": accuracy}
        scores["per_answer_type"] = {name: mean(types[name]) for name in sorted(types)}
        unavailable = {}
        for name, answerable in (("answerable_only", True), ("unanswerable_only", False)):
            if answerable in halves:
                scores[name] = mean(halves[answerable])
            else:
                unavailable[name] = "the ground truth has no such question"
        if self.rule == API:
            scores["unanswerability"] = _unanswerability(truth, matched.texts)
        rows = {"accuracy": (100 * accuracy, len(marks))}
        rows |= {name: (100 * mean(values), len(values)) for name, values in sorted(types.items())}
        extras = {
            "count_per_answer_type": {name: len(types[name]) for name in sorted(types)},
            **matched.notes(),
        }
        return Score(scores, len(marks), rows, extras, {"per_item": marks}, marks, unavailable, self.rule)

    def submission_questions(self, root: Path) -> Path:
        return self.question_file(root)

    def submission(self, predictions: Sequence[Mapping[str, Any]], questions: Path | None) -> Submission:
        return normalised_answers(predictions, questions, "image", complete=True)


def _number(image: str, file: str | Path) -> int:
    """Read a question's id from its image's number, as LLaVA does."""
    found = re.search(r"(\d+)\.\w+$", image)
    if not found:
        raise DataError(f"{file}: a record without question_id needs a number in its image's name, not {image!r}")
    return int(found.group(1))


def _by_m4c(text: str, references: Sequence[str]) -> float:
    return agreement(normalise_evalai(text), [normalise_evalai(reference) for reference in references])


def _by_api(text: str, references: Sequence[str]) -> float:
    return agreement(normalise_vizwiz(text), references)


def _unanswerability(truth: Sequence[Mapping[str, Any]], texts: Sequence[str | None]) -> dict[str, float]:
    """Rate the detection of unanswerable questions: average precision and F1, percent."""
    flagged = [text is not None and normalise_vizwiz(text) == "unanswerable" for text in texts]
    real = [not row["answerable"] for row in truth]
    hits = sum(a and b for a, b in zip(flagged, real, strict=True))
    positives, share = sum(real), sum(real) / len(real)
    precision = hits / sum(flagged) if any(flagged) else 0.0
    recall = hits / positives if positives else 0.0
    # Area under the steps of the precision-recall curve; a yes/no answer gives two thresholds.
    average_precision = recall * precision + (1 - recall) * share if positives else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"average_precision_percent": 100 * average_precision, "f1_percent": 100 * f1}
