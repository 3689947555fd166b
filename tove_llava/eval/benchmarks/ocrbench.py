"""OCRBench (Liu et al. 2024, arXiv 2305.07895): reading of text, documents, receipts and formulas.

Files: the authors' ``ocrbench/OCRBench.json`` and ``ocrbench/OCRBench_Images/``, or the hub's
``ocrbench/data/test-*.parquet``. A question's id is its row, from 0, because the authors' ids are not unique. Prompt
and score are the authors': points, one for each answer that holds a right one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tove_llava.eval.benchmarks import SHORT_ANSWER, Score, register_benchmark
from tove_llava.eval.fields import TEXT, Row, a_list, check_row, one_of
from tove_llava.eval.matching import Matched
from tove_llava.eval.public_files import PublicBenchmark
from tove_llava.eval.rules.contains_text import ContainsText

RECOGNITION = "Text Recognition"
_PARTS = ("Regular Text", "Irregular Text", "Artistic Text", "Handwriting", "Digit String", "Non-Semantic Text")
GROUPS = {f"{part} Recognition": RECOGNITION for part in _PARTS}
GROUPS |= {name: name for name in ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction")}
GROUPS["Handwritten Mathematical Expression Recognition"] = "Handwritten Mathematical Expression Recognition"
FORMULAS = "HME100k"


def _formula(text: str) -> str:
    return text.strip().replace("\n", "").replace(" ", "")


@register_benchmark("ocrbench")
class OcrBench(PublicBenchmark):
    """Points, in all and in five groups."""

    files = ("ocrbench/OCRBench.json", "ocrbench/data/test-*.parquet")
    columns = {"question": TEXT}  # the others have other names in the two layouts
    image_folder = "ocrbench/OCRBench_Images"
    images = ("image", "image_path")
    levels = ("group", "type")
    max_new_tokens = 128
    marking = ContainsText()

    def row(self, record: Row, number: int, place: str) -> Row:
        names = (
            ("dataset_name", "answers", "type") if "dataset_name" in record else ("dataset", "answer", "question_type")
        )
        dataset, answer, kind = names
        if isinstance(record.get(answer), str):
            record = {**record, answer: [record[answer]]}
        check_row(record, place, {dataset: TEXT, answer: a_list(TEXT), kind: one_of(*GROUPS)})
        known = {"dataset": record[dataset], "answers": record[answer], "type": record[kind]}
        return {"question_id": number, **known, "group": GROUPS[record[kind]]}

    def prompt(self, record: Row) -> str:
        return f"{record['question']}\n{SHORT_ANSWER}"

    def heard(self, text: str) -> str:
        return text

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        if row["dataset"] == FORMULAS:  # case and inner spaces are LaTeX's
            return float(any(_formula(answer) in _formula(text) for answer in row["answers"]))
        return super().mark(row, text)

    def summary(self, marks: Mapping[Any, float], truth: Sequence[Mapping[str, Any]], matched: Matched) -> Score:
        found = super().summary(marks, truth, matched)
        points = {level: self.grouped(marks, truth, level) for level in self.levels}
        scores = {
            "total": int(sum(marks.values())),
            "accuracy": found.scores["accuracy"],
            "text_recognition": int(sum(points["group"].get(RECOGNITION, []))),
            **{f"per_{level}": {name: int(sum(values)) for name, values in points[level].items()} for level in points},
        }
        return replace(found, scores=scores)
