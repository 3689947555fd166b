"""BLINK (Fu et al. 2024, arXiv 2404.12390): fourteen perception tasks, with one to four images a question.

``blink/TASK/val-*.parquet`` are the files of ``BLINK-Benchmark/BLINK``. Answers are read as by the authors'
``test_benchmark.py``, but no judge is asked about the others: these are wrong, and listed as unparsed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import Score, register_benchmark
from tove_llava.eval.choices import CHOICES, ChoiceBenchmark, key_letter, lettered
from tove_llava.eval.fields import TEXT
from tove_llava.eval.matching import Matched
from tove_llava.eval.rows import Row

#: Cambrian's; the authors add none
REQUEST = "Please answer directly with only the letter of the correct option and nothing else."


@register_benchmark("blink")
class Blink(ChoiceBenchmark):
    """Mean of the tasks' accuracies."""

    files = ("blink/*/val-*.parquet",)
    columns = {"idx": TEXT, "prompt": TEXT, "choices": CHOICES, "answer": TEXT}
    images = ("image_1", "image_2", "image_3", "image_4")
    levels = ("task",)
    max_new_tokens = 1024

    def row(self, record: Row, number: int, place: str) -> Row:
        split, _, name = record["idx"].partition("_")
        if split != "val" or "_" not in name:
            raise DataError(f"{place}: 'idx' must be like 'val_Counting_1', not {record['idx']!r:.80}")
        options = lettered(record["choices"])
        answer = key_letter(record["answer"], options, place)
        return {"question_id": record["idx"], "answer": answer, "options": options, "task": name.rpartition("_")[0]}

    def prompt(self, record: Row) -> str:
        return f"{record['prompt']}\n{REQUEST}"

    def read(self, row: Mapping[str, Any], text: str) -> str | None:
        if text in tuple("ABCDE"):
            return text
        options = {f"({letter})": letter for letter in row["options"]}
        if text in ("(A)", "(B)", "(C)", "(D)", "(E)"):
            return text[1]
        return _only(text.split("\n\n")[-1].split(), options) or _only(text.split(), options)

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return self.read(row, text) is not None

    def summary(self, marks: Mapping[Any, float], truth: Sequence[Mapping[str, Any]], matched: Matched) -> Score:
        score = super().summary(marks, truth, matched)
        accuracy = mean(list(score.scores["per_task"].values()))
        rows = {**score.rows, "accuracy": (100 * accuracy, len(marks))}
        return replace(score, scores={**score.scores, "accuracy": accuracy}, rows=rows)


def _only(tokens: Iterable[str], options: Mapping[str, str]) -> str | None:
    """Return the letter of the only kind of option token."""
    found = {options[token] for token in tokens if token in options}
    return found.pop() if len(found) == 1 else None
