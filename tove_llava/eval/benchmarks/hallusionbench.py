"""HallusionBench (Guan et al. 2024, arXiv 2310.14566): yes/no questions about figures, also edited or left out.

Files: ``hallusionbench/HallusionBench.json`` and ``hallusionbench/hallusion_bench/``. The authors count verdicts of
GPT-4. Here VLMEvalKit's rule reads yes or no instead, and the counting is the authors': an answer that is neither is
right where there is no image to answer from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import Question, Score, register_benchmark
from tove_llava.eval.fields import TEXT, Row, one_of
from tove_llava.eval.matching import Matched
from tove_llava.eval.normalisation import strip_punctuation
from tove_llava.eval.public_files import PublicBenchmark

_ID = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")
EDITED = "2"


def parse_answer(text: str) -> bool | None:
    """Return True or False if the words have yes or no and not both."""
    words = strip_punctuation(text.lower(), unicode_digits=True).split()
    return None if ("yes" in words) == ("no" in words) else "yes" in words


def _needs_no_image(row: Mapping[str, Any]) -> bool:
    return bool(row["category"] == "VS" and row["figure_id"] == "0")


@register_benchmark("hallusionbench")
class HallusionBench(PublicBenchmark):
    """Accuracy of questions, and of questions and figures that are right throughout."""

    files = ("hallusionbench/HallusionBench.json",)
    columns = {
        **dict.fromkeys(_ID, TEXT),
        "category": one_of("VD", "VS"),
        "visual_input": one_of("0", "1", EDITED),
        "question": TEXT,
        "gt_answer": one_of("0", "1"),
        "filename": (str, type(None)),
    }
    image_folder = "hallusionbench/hallusion_bench"
    images = ("filename",)
    levels = ("category", "subcategory")
    max_new_tokens = 128

    def row(self, record: Row, number: int, place: str) -> Row:
        keys = {key: record[key] for key in _ID}
        answer = "yes" if record["gt_answer"] == "1" else "no"
        name, part = "_".join(keys.values()), f"{keys['category']}_{keys['subcategory']}"
        return {**keys, "question": keys["question_id"], "question_id": name, "subcategory": part, "answer": answer}

    def prompt(self, record: Row) -> str:
        return str(record["question"])

    def unit(self, question: Question) -> str:
        parts = str(question.question_id).split("_")  # a set's questions are scored together
        return "_".join([*parts[:-4], parts[-3]])

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return parse_answer(text) is not None

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        answer = parse_answer(text)
        return float(_needs_no_image(row) if answer is None else answer == (row["answer"] == "yes"))

    def summary(self, marks: Mapping[Any, float], truth: Sequence[Mapping[str, Any]], matched: Matched) -> Score:
        found = super().summary(marks, truth, matched)

        def whole(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
            groups: dict[Any, list[float]] = {}
            for row in rows:
                group = row["subcategory"], row["set_id"], row[key]
                groups.setdefault(group, []).append(marks[row["question_id"]])
            return [min(values) for values in groups.values()]

        shares = {
            "qAcc": whole(truth, "question"),
            "fAcc": whole([row for row in truth if not _needs_no_image(row)], "figure_id"),
            "easy_aAcc": whole([row for row in truth if row["visual_input"] != EDITED], "question"),
            "hard_aAcc": whole([row for row in truth if row["visual_input"] == EDITED], "question"),
        }
        shares = {"aAcc": list(marks.values())} | {name: values for name, values in shares.items() if values}
        scores: dict[str, Any] = {name: mean(values) for name, values in shares.items()}
        rows = {name: (100 * scores[name], len(values)) for name, values in shares.items()}
        parts = {label: row for label, row in found.rows.items() if label != "accuracy"}  # is aAcc
        scores |= {name: value for name, value in found.scores.items() if name != "accuracy"}
        return replace(found, scores=scores, rows={**rows, **parts})
