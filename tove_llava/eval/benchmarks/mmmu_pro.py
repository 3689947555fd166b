"""MMMU-Pro (Yue et al. 2024, arXiv 2409.02813), standard setting: MMMU's questions with up to ten options.

Files of ``MMMU/MMMU_Pro``: ``mmmu_pro/standard (10 options)/test-*.parquet``, or the folder with 4 options. The rule is
the authors' without random letters, the prompt lmms-eval's.
"""

from collections.abc import Mapping
from typing import Any

from tove_llava.eval.benchmarks import register_benchmark
from tove_llava.eval.benchmarks.mmmu import WithImages
from tove_llava.eval.choices import ChoiceBenchmark, key_letter, lettered, option_lines, written_list, written_options
from tove_llava.eval.fields import TEXT, Row
from tove_llava.eval.mmmu_rule import choice_of_pro

_REQUEST = "Answer with the option letter from the given choices directly."


@register_benchmark("mmmu_pro")
class MmmuPro(WithImages, ChoiceBenchmark):
    """Accuracy, by subject."""

    files = tuple(f"mmmu_pro/standard ({count} options)/test-*.parquet" for count in (10, 4))
    columns = {"id": TEXT, "question": TEXT, "options": object, "answer": TEXT, "subject": TEXT}
    levels = ("subject",)
    max_new_tokens = 256

    def row(self, record: Row, number: int, place: str) -> Row:
        options = written_options(record, place)
        answer = key_letter(record["answer"], options, place)
        return {"question_id": record["id"], "subject": record["subject"], "options": options, "answer": answer}

    def prompt(self, record: Row) -> str:
        return f"{record['question']}\n{option_lines(lettered(written_list(record['options'])))}\n\n{_REQUEST}"

    def read(self, row: Mapping[str, Any], text: str) -> str | None:
        return choice_of_pro(text, row["options"])
