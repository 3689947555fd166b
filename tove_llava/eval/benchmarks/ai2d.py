"""AI2D (Kembhavi et al. 2016, arXiv 1603.07396): diagrams from science books, whose labels are masked by letters.

``ai2d/data/test-*.parquet`` of ``lmms-lab/ai2d``; the copies without masks have the same layout and other images. The
rule is lmms-eval's: the answer must be the letter, or begin with the letter and a full stop.
"""

import re
from collections.abc import Mapping
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.eval.benchmarks import OPTION_LETTER, register_benchmark
from tove_llava.eval.choices import (
    CHOICES,
    INDEX,
    ChoiceBenchmark,
    lettered,
    option_lines,
    without_punctuation,
)
from tove_llava.eval.fields import TEXT
from tove_llava.eval.rows import Row
from tove_llava.inference.reasoning import cut_reasoning

_FIRST_LETTER = re.compile(r"\s*([A-Z])\.")


@register_benchmark("ai2d")
class Ai2d(ChoiceBenchmark):
    """Accuracy."""

    files = ("ai2d/data/test-*.parquet", "ai2d/*.parquet")
    columns = {"question": TEXT, "options": CHOICES, "answer": INDEX}
    max_new_tokens = 16

    def row(self, record: Row, number: int, place: str) -> Row:
        options = lettered(record["options"])
        letters = {str(number): letter for number, letter in enumerate(options)}
        if (index := str(record["answer"])) not in letters:
            raise DataError(f"{place}: the answer {index!r:.80} is no index of an option; there are {len(options)}")
        return {"question_id": number, "answer": letters[index], "options": options}

    def prompt(self, record: Row) -> str:
        return f"{record['question']}\n{option_lines(lettered(record['options']))}\n{OPTION_LETTER}"

    def read(self, row: Mapping[str, Any], text: str) -> str | None:
        if begin := _FIRST_LETTER.match(text):
            text = begin.group(1)
        return without_punctuation(cut_reasoning(text)).upper() or None
