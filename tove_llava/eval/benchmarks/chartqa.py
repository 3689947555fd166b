"""ChartQA (Masry et al. 2022, arXiv 2203.10244): questions about charts.

Files: lmms-lab's ``chartqa/test-*.parquet``, or the authors' ``chartqa/test_human.json``, ``test_augmented.json`` and
``png/``. A question's id is its row, from 0. Prompt, reading and score are lmms-eval's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tove_llava.eval.benchmarks import Score, register_benchmark
from tove_llava.eval.fields import TEXT, Row, check_row, one_of
from tove_llava.eval.matching import Matched
from tove_llava.eval.public_files import PublicBenchmark
from tove_llava.eval.rules.relaxed_accuracy import RelaxedAccuracy
from tove_llava.inference.reasoning import cut_reasoning

_TYPES = {"human_test": "human", "augmented_test": "augmented"}
_HALVES = ("test_human.json", "test_augmented.json")


def _with_other_half(file: Path) -> list[Path]:
    return [file.with_name(half) for half in _HALVES] if file.name in _HALVES else [file]


@register_benchmark("chartqa")
class ChartQa(PublicBenchmark):
    """Relaxed accuracy, overall and of the questions that people and a model wrote."""

    files = ("chartqa/test-*.parquet", f"chartqa/{_HALVES[0]}")
    columns = {}  # of two layouts; see row
    image_folder = "chartqa/png"
    images = ("image", "imgname")
    levels = ("type",)
    max_new_tokens = 16
    marking = RelaxedAccuracy()

    def found(self, root: Path) -> list[Path]:
        files = super().found(root)
        return _with_other_half(files[0]) if len(files) == 1 else files

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        return [row for row, _, _ in self._rows(_with_other_half(Path(file)))]

    def row(self, record: Row, number: int, place: str) -> Row:
        if "imgname" in record:
            check_row(record, place, {"imgname": TEXT, "query": TEXT, "label": TEXT})
            half = "human" if _HALVES[0] in place else "augmented"
            return {"question_id": number, "type": half, "answers": [record["label"]]}
        check_row(record, place, {"question": TEXT, "answer": TEXT, "type": one_of(*_TYPES)})
        return {"question_id": number, "type": _TYPES[record["type"]], "answers": [record["answer"]]}

    def prompt(self, record: Row) -> str:
        return f"{record.get('query', record.get('question'))}\nAnswer the question with a single word."

    def heard(self, text: str) -> str:
        return cut_reasoning(text)

    def summary(self, marks: Mapping[Any, float], truth: Sequence[Mapping[str, Any]], matched: Matched) -> Score:
        found = super().summary(marks, truth, matched)
        return replace(found, scores={"accuracy": found.scores["accuracy"], **found.scores["per_type"]})
