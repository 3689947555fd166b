"""The official VQA evaluation (GT-Vision-Lab/VQA, ``vqaEval.py``), which VQAv2 and OK-VQA share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json
from tove_llava.eval.agreement import agreement, mean, record_copies, rounded
from tove_llava.eval.benchmarks import Benchmark, Score
from tove_llava.eval.fields import ID, TEN_ANSWERS, Kinds, check_rows
from tove_llava.eval.normalisation import flatten, normalise_evalai, normalise_vqa
from tove_llava.eval.rows import Row, read_truth

OFFICIAL, LLAVA = "official", "llava"
RULES = {
    OFFICIAL: "the official program on the raw answers",
    LLAVA: "the official program on answers that LLaVA's conversion has normalised, as its submissions are scored",
}
_RECORD: Kinds = {"question_id": ID, "answers": TEN_ANSWERS, "question_type": str, "answer_type": str}


def vqa_accuracy(text: str, records: Sequence[Mapping[str, Any]]) -> float:
    """Return the accuracy of one answer, 0 to 1.

    Where all references are the same string after trimming, neither side is normalised any further.

    Args:
        records: the references; ``answer`` in each. Whole records are compared, so ``answer_id`` matters.
    """
    answer = flatten(text)
    references = [flatten(record["answer"]) for record in records]
    if len(set(references)) > 1:
        answer = normalise_vqa(answer)
        references = [normalise_vqa(reference) for reference in references]
    if answer not in references:
        return 0.0
    same = [{**record, "answer": reference} for record, reference in zip(records, references, strict=True)]
    return agreement(answer, references, record_copies(same))


def read_annotations(file: str | Path) -> list[Row]:
    """Read annotations from the official JSON, or JSONL with one a line.

    Raises:
        DataError: the file is malformed or not a VQA annotation file.
    """
    if Path(file).suffix == ".jsonl":
        return read_truth(file, _RECORD)
    content = read_json(file)
    rows = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{file} has no list of annotations; give the benchmark's annotation file")
    return check_rows(rows, file, _RECORD)


class VqaBenchmark(Benchmark):
    """Short answers compared with ten human ones."""

    max_new_tokens = 128
    rules = RULES

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        return read_annotations(file)

    def groups(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        return {"answer type": [row["answer_type"]], "question type": [row["question_type"]]}

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        marks: dict[Any, float] = {}
        answer_types: dict[str, list[float]] = {}
        question_types: dict[str, list[float]] = {}
        for row, text in zip(truth, matched.texts, strict=True):
            if text is not None and self.rule == LLAVA:
                text = normalise_evalai(text)
            mark = 0.0 if text is None else vqa_accuracy(text, row["answers"])
            marks[row["question_id"]] = mark
            answer_types.setdefault(row["answer_type"], []).append(mark)
            question_types.setdefault(row["question_type"], []).append(mark)
        overall = 100 * mean(list(marks.values()))
        per_answer_type = {name: 100 * mean(values) for name, values in answer_types.items()}
        scores = {
            "overall": rounded(overall, 2),
            "per_answer_type": {name: rounded(value, 2) for name, value in per_answer_type.items()},
            "per_question_type": {name: rounded(100 * mean(values), 2) for name, values in question_types.items()},
            "overall_unrounded": overall,
            "per_answer_type_unrounded": per_answer_type,
        }
        rows = {"overall": (overall, len(marks))}
        rows |= {name: (value, len(answer_types[name])) for name, value in per_answer_type.items()}
        per_item = {key: rounded(100 * mark, 2) for key, mark in marks.items()}
        return Score(scores, len(marks), rows, matched.notes(), {"per_item": per_item}, marks, rule=self.rule)
