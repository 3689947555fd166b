"""MMVP (Tong et al. 2024, arXiv 2401.06209): pairs of images that CLIP takes for the same.

``mmvp/Questions.csv`` and ``mmvp/MMVP Images/`` are the release; ``lmms-lab-eval/MMVP`` (Parquet) is read too. Answers
are read as by Cambrian's ``mmvp_test.py``. The release's keys of 99, 100, 279 and 280 are swapped; the Parquet copy has
them right, so scores on the two differ by up to two pairs.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import OPTION_LETTER, Question, Score, register_benchmark
from tove_llava.eval.choices import INDEX, ChoiceBenchmark, cambrian_answer, key_letter, lettered, option_lines
from tove_llava.eval.fields import TEXT, check_row
from tove_llava.eval.matching import Matched
from tove_llava.eval.public_files import Image
from tove_llava.eval.rows import Row

FAULTY_KEYS = (99, 100, 279, 280)
_LETTER = re.compile(r"\([a-z]\)")


@register_benchmark("mmvp")
class Mmvp(ChoiceBenchmark):
    """Share of pairs with two right answers; pairs are neighbours in question order."""

    files = ("mmvp/Questions.csv", "mmvp/data/*.parquet", "mmvp/*.parquet")
    columns = {"Question": TEXT, "Options": TEXT, "Correct Answer": TEXT}
    levels = ("pair",)
    max_new_tokens = 512

    def row(self, record: Row, number: int, place: str) -> Row:
        options = _options(record)
        index = int(check_row({"Index": _index(record)}, place, {"Index": INDEX})["Index"])
        answer = key_letter(record["Correct Answer"], options, place)
        return {"question_id": index, "answer": answer, "options": options, "pair": number // 2 + 1}

    def record_images(self, record: Row, place: str, root: Path) -> list[Image]:
        if "image" in record:
            return super().record_images(record, place, root)
        return [root / "mmvp" / "MMVP Images" / f"{_index(record)}.jpg"]

    def prompt(self, record: Row) -> str:
        return f"{record['Question']} Options:\n{option_lines(_options(record))}\n{OPTION_LETTER}"

    def read(self, row: Mapping[str, Any], text: str) -> str | None:
        found = cambrian_answer(text, ".:,")
        # Words in brackets belong to no option, as in Cambrian's program.
        words = {letter: option.partition("(")[0].strip().lower() for letter, option in row["options"].items()}
        named = [letter for letter in words if found in (letter.lower(), words[letter])]
        return row["answer"] if row["answer"] in named else next(iter(named), None)

    def groups(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        return {}

    def unit(self, question: Question) -> Hashable:
        return question.metadata["pair"]  # both have to be right

    def summary(self, marks: Mapping[Any, float], truth: Sequence[Mapping[str, Any]], matched: Matched) -> Score:
        first = {str(row["pair"]): row["question_id"] for row in reversed(truth)}
        both = self.grouped(marks, truth, "pair")
        if lonely := [first[pair] for pair, found in both.items() if len(found) != 2]:
            raise DataError(f"question {lonely[0]} has no other of its pair; give the whole file, in its order")
        pairs = {first[pair]: float(all(found)) for pair, found in both.items()}
        scores = {"accuracy": mean(list(pairs.values())), "question_accuracy": mean(list(marks.values()))}
        rows = {
            "pairs": (100 * scores["accuracy"], len(pairs)),
            "questions": (100 * scores["question_accuracy"], len(marks)),
        }
        faulty = [row["question_id"] for row in truth if row["question_id"] in FAULTY_KEYS]
        extras = {"count_pairs": len(pairs), "keys_swapped_in_the_release": faulty, **matched.notes()}
        return Score(scores, len(marks), rows, extras, {"per_item": dict(marks)}, pairs)


def _index(record: Row) -> Any:
    return record.get("Index", record.get("lndex"))  # the header is misspelt in a version of the release


def _options(record: Row) -> dict[str, str]:
    return lettered([words.strip() for words in _LETTER.split(record["Options"])[1:]])
