"""MMStar (Chen et al. 2024, arXiv 2403.20330): questions that need the image; they hold their options.

``mmstar/mmstar.parquet`` or ``mmstar/MMStar.tsv`` of ``Lin-Chen/MMStar``. Answers are read as by the authors'
``MMStar_eval``: the first character counts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tove_llava.eval.benchmarks import OPTION_LETTER, Question, Score, register_benchmark
from tove_llava.eval.choices import INDEX, ChoiceBenchmark
from tove_llava.eval.fields import TEXT, one_of
from tove_llava.eval.matching import Matched
from tove_llava.eval.rows import Row

_OPTION = re.compile(r"([A-D]): (.*?)(?=, [B-D]: |$)")
_LEADS = ("(", "option ", "the answer is ")


@register_benchmark("mmstar")
class MmStar(ChoiceBenchmark):
    """Accuracy, overall, per category and per sub-category."""

    files = ("mmstar/mmstar.parquet", "mmstar/MMStar.tsv")
    columns = {
        "index": INDEX,
        "question": TEXT,
        "answer": one_of(*"ABCD"),
        "category": TEXT,
        "l2_category": TEXT,
    }
    levels = ("category", "l2_category")
    max_new_tokens = 32

    def row(self, record: Row, number: int, place: str) -> Row:
        labels = {level: record[level] for level in self.levels}
        options = dict.fromkeys("ABCD", "")
        return {"question_id": int(record["index"]), "answer": record["answer"], "options": options, **labels}

    def prompt(self, record: Row) -> str:
        return f"{record['question']}\n{OPTION_LETTER.removesuffix('.')}"

    def options(self, question: Question) -> dict[str, str]:
        return dict(_OPTION.findall(question.text.rpartition("Options: ")[2].partition("\n")[0]))

    def read(self, row: Mapping[str, Any], text: str) -> str | None:
        text = text.lower().strip().replace("\n", " ")
        lead = next((lead for lead in _LEADS if text.startswith(lead)), "")
        return text[len(lead) :][:1].upper() or None

    def summary(self, marks: Mapping[Any, float], truth: Sequence[Mapping[str, Any]], matched: Matched) -> Score:
        score = super().summary(marks, truth, matched)
        above = {row["l2_category"]: row["category"] for row in truth}
        nested: dict[str, dict[str, float]] = {name: {} for name in above.values()}
        for name, value in score.scores["per_l2_category"].items():
            nested[above[name]][name] = value
        return replace(score, scores={**score.scores, "per_l2_category": nested})
