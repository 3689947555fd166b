"""CV-Bench (Tong et al. 2024, arXiv 2406.16860): counting, relations, depth and distance, from 2D and 3D data sets.

Files of ``nyu-visionx/CV-Bench`` lie in ``cv_bench/``. Answers are read and combined as by Cambrian's scripts ``ade``,
``coco`` and ``omni``: the first character after "answer is" counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import OPTION_LETTER, Score, register_benchmark
from tove_llava.eval.choices import CHOICES, INDEX, ChoiceBenchmark, cambrian_answer, key_letter, lettered
from tove_llava.eval.fields import TEXT, one_of
from tove_llava.eval.matching import Matched
from tove_llava.eval.rows import Row

SOURCES_2D, SOURCE_3D = ("ADE20K", "COCO"), "Omni3D"


@register_benchmark("cv_bench")
class CvBench(ChoiceBenchmark):
    """Mean of the 2D accuracy (itself a mean of two sources) and the 3D accuracy."""

    files = ("cv_bench/test_*.parquet",)
    columns = {
        "idx": INDEX,
        "prompt": TEXT,
        "choices": CHOICES,
        "answer": TEXT,
        "task": TEXT,
        "source": one_of(*SOURCES_2D, SOURCE_3D),
    }
    levels = ("source", "task")
    max_new_tokens = 512

    def row(self, record: Row, number: int, place: str) -> Row:
        options = lettered(record["choices"])
        answer = key_letter(record["answer"], options, place)
        labels = {level: record[level] for level in self.levels}
        return {"question_id": int(record["idx"]), "answer": answer, "options": options, **labels}

    def prompt(self, record: Row) -> str:
        return f"{record['prompt']}\n{OPTION_LETTER}"

    def read(self, row: Mapping[str, Any], text: str) -> str | None:
        is_3d = row["source"] == SOURCE_3D
        first = cambrian_answer(text, ".:," if is_3d else ".")[:1]
        if is_3d and first and first == row["options"][row["answer"]].lower():
            return str(row["answer"])
        return first.upper() or None

    def summary(self, marks: Mapping[Any, float], truth: Sequence[Mapping[str, Any]], matched: Matched) -> Score:
        score = super().summary(marks, truth, matched)
        by_source = score.scores["per_source"]
        parts = {"accuracy_2d": [by_source.get(name) for name in SOURCES_2D], "accuracy_3d": [by_source.get(SOURCE_3D)]}
        parts = {name: values for name, values in parts.items() if None not in values}
        found = {name: mean(values) for name, values in parts.items()}
        if len(found) == 2:
            found["accuracy"] = mean(list(found.values()))
        missing = {name for name in ("accuracy", "accuracy_2d", "accuracy_3d") if name not in found}
        unavailable = dict.fromkeys(sorted(missing), "the ground truth lacks one of ADE20K, COCO and Omni3D")
        tables = {name: value for name, value in score.scores.items() if name.startswith("per_")}
        counts = {"accuracy": len(truth), "accuracy_2d": 0, "accuracy_3d": 0}
        for row in truth:
            counts["accuracy_3d" if row["source"] == SOURCE_3D else "accuracy_2d"] += 1
        rows = {name: (100 * value, counts[name]) for name, value in sorted(found.items())}
        rows |= {name: entry for name, entry in score.rows.items() if name != "accuracy"}
        return replace(score, scores={**found, **tables}, rows=rows, unavailable=unavailable)
