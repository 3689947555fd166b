"""RealWorldQA (xAI 2024): photographs, many from cars; the question holds its options and its request.

Parquet files of ``lmms-lab/RealWorldQA`` or ``xai-org/RealworldQA`` lie in ``realworldqa/data/``. The rule is
lmms-eval's: a letter is extracted where the key is one, else the words must be equal.
"""

from collections.abc import Mapping
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.eval.benchmarks import register_benchmark
from tove_llava.eval.fields import TEXT
from tove_llava.eval.public_files import PublicBenchmark
from tove_llava.eval.rows import Row
from tove_llava.eval.rules.choice_letter import letter_of
from tove_llava.inference.reasoning import cut_reasoning

LETTERS = "ABCD"


@register_benchmark("realworldqa")
class RealWorldQa(PublicBenchmark):
    """Accuracy, overall, and of questions by letter and by words."""

    files = ("realworldqa/data/test-*.parquet", "realworldqa/*.parquet")
    columns = {"question": TEXT, "answer": TEXT}
    levels = ("kind",)
    max_new_tokens = 16

    def row(self, record: Row, number: int, place: str) -> Row:
        if others := sorted(record.keys() - {"question", "answer", "image", "image_path"}):
            raise DataError(f"{place}: RealWorldQA has no column {others[0]!r}; is it another benchmark's file?")
        answer = record["answer"].strip()
        return {"question_id": number, "answer": answer, "kind": "letter" if answer in tuple(LETTERS) else "words"}

    def prompt(self, record: Row) -> str:
        return str(record["question"])

    def read(self, row: Mapping[str, Any], text: str) -> str | None:
        text = cut_reasoning(text)
        return letter_of(text, LETTERS) if row["kind"] == "letter" else text.lower().strip().rstrip(".")

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        answer = row["answer"] if row["kind"] == "letter" else row["answer"].lower()
        return float(self.read(row, text) == answer)

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return bool(self.read(row, text))
