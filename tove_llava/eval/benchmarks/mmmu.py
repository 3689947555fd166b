"""MMMU validation (Yue et al. 2024, arXiv 2311.16502): college questions with up to seven images.

Files: ``mmmu/data/validation-*.parquet`` of ``lmms-lab/MMMU``, or ``mmmu/SUBJECT/validation-*.parquet`` of
``MMMU/MMMU``. The prompt is that of the authors' LLaVA-1.5, the rule the authors'. Their program draws a letter where
it finds none; here such an answer is wrong and unparsed, unless the rule is "random".
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.eval.benchmarks import OPTION_LETTER, SHORT_ANSWER, Score, register_benchmark
from tove_llava.eval.choices import key_letter, lettered, written_list, written_options
from tove_llava.eval.fields import TEXT, Row, a_list, check_row, one_of
from tove_llava.eval.mmmu_rule import choice_of, is_right
from tove_llava.eval.public_files import Image, PublicBenchmark
from tove_llava.eval.scorer_data import scorer_data

RANDOM = "random"
_SEED = 42
_CHOICE = "multiple-choice"
IMAGES = tuple(f"image_{number}" for number in range(1, 8))


class WithImages(PublicBenchmark):
    """Questions that refer to their images as ``<image 1>``, ``<image 2>``, ..."""

    images = IMAGES

    def record_images(self, record: Row, place: str, root: Path) -> list[Image]:
        found = super().record_images(record, place, root)
        if not found:
            raise DataError(f"{place}: the question {record['id']!r} has no image in {IMAGES[0]} to {IMAGES[-1]}")
        return found


@register_benchmark("mmmu")
class Mmmu(WithImages):
    """Accuracy, by domain and by subject."""

    files = ("mmmu/*/validation-*.parquet",)
    columns = {
        "id": TEXT,
        "question": TEXT,
        "options": object,
        "answer": TEXT,
        "question_type": one_of(_CHOICE, "open"),
    }
    levels = ("domain", "subject")
    max_new_tokens = 128
    rules = {
        "unparsed": "an answer in which the authors' rule finds no letter is wrong",
        RANDOM: "a random letter for it, in the file's order, as the authors' program draws it (seed 42)",
    }

    def row(self, record: Row, number: int, place: str) -> Row:
        name = record["id"]
        subject = name.partition("_")[2].rpartition("_")[0]
        domains = scorer_data("mmmu_domains")
        if subject not in domains:
            raise DataError(f"{place}: the id {name!r} has none of MMMU's {len(domains)} subjects")
        row = {"question_id": name, "domain": domains[subject], "subject": subject}
        if record["question_type"] == _CHOICE:
            options = written_options(record, place)
            return {**row, "options": options, "answer": key_letter(record["answer"], options, place)}
        answers = written_list(record["answer"])
        answers = answers if isinstance(answers, list) else [answers]
        check_row({**record, "answer": answers}, place, {"answer": a_list(str)})
        return {**row, "options": {}, "answers": answers}

    def prompt(self, record: Row) -> str:
        if record["question_type"] != _CHOICE:
            return f"{record['question']}\n\n{SHORT_ANSWER}"
        options = lettered(written_list(record["options"]))
        lines = "\n".join(f"({letter}) {words}" for letter, words in options.items())
        return f"{record['question']}\n\n{lines}\n\n{OPTION_LETTER}"

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return choice_of(text, row["options"]) is not None if row["options"] else bool(text.strip())

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        self._dice = random.Random(_SEED)
        return super().score(predictions, truth)

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        if not row["options"]:
            return float(is_right(text, row["answers"]))
        letter = choice_of(text, row["options"])
        if letter is None and self.rule == RANDOM:
            letter = self._dice.choice(list(row["options"]))
        return float(letter == row["answer"])
