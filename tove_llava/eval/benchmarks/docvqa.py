"""DocVQA (Mathew et al. 2021, arXiv 2007.00398): questions about scanned documents.

Files: lmms-lab's ``docvqa/DocVQA/*.parquet``, or the challenge's ``docvqa/val_v1.0_withQT.json`` and
``docvqa/documents/``. Without a validation file the test file is read (``test_v1.0.json``); its answers are not public.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.eval.benchmarks import SHORT_ANSWER, Score, register_benchmark
from tove_llava.eval.choices import INDEX
from tove_llava.eval.fields import TEXT, Row, a_list, check_row
from tove_llava.eval.matching import Matched
from tove_llava.eval.public_files import PublicBenchmark
from tove_llava.eval.rules.edit_distance import EditDistance
from tove_llava.eval.server_files import Submission, Submitting, known, require_all
from tove_llava.inference.reasoning import cut_reasoning

OFFICIAL, LMMS_EVAL = "official", "lmms_eval"


class ReadingBenchmark(Submitting, PublicBenchmark):
    """ANLS of the challenge on reading documents (rrc.cvc.uab.es/?ch=17)."""

    columns = {"questionId": INDEX, "question": TEXT, "data_split": TEXT}
    max_new_tokens = 32
    marking = EditDistance()
    rules = {
        OFFICIAL: "the challenge's program, which compares the raw answer",
        LMMS_EVAL: "the same without think and analysis blocks, and without spaces at the ends",
    }

    def row(self, record: Row, number: int, place: str) -> Row:
        if record["data_split"] == "test":
            return {"question_id": int(record["questionId"]), "answers": None}
        answers = check_row(record, place, {"answers": a_list(str)})["answers"]
        return {"question_id": int(record["questionId"]), "answers": answers}

    def prompt(self, record: Row) -> str:
        return f"{record['question']}\n{SHORT_ANSWER}"

    def ground_truth(self, root: Path) -> list[Row] | None:
        rows = super().ground_truth(root) or []
        return None if any(row["answers"] is None for row in rows) else rows

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        rows = super().read_ground_truth(file)
        if any(row["answers"] is None for row in rows):
            raise DataError(f"{file} has no answers; 'tove-llava submission' makes the file for the server")
        return rows

    def heard(self, text: str) -> str:
        return cut_reasoning(text) if self.rule == LMMS_EVAL else text

    def summary(self, marks: Mapping[Any, float], truth: Sequence[Mapping[str, Any]], matched: Matched) -> Score:
        found = super().summary(marks, truth, matched)
        return replace(found, scores={"anls": found.scores["accuracy"]}, rows={"anls": found.rows["accuracy"]})

    def submission_questions(self, root: Path) -> Path:
        tests = [file for pattern in self.files if "test" in pattern for file in sorted(root.glob(pattern))]
        return tests[0] if tests else self.question_file(root)

    def submission(self, predictions: Sequence[Mapping[str, Any]], questions: Path | None) -> Submission:
        file = known(questions)
        shards = sorted(file.parent.glob(f"{file.name.partition('-')[0]}-*.parquet")) or [file]
        rows = [row for row, _, _ in self._rows(shards)]
        matched = self.pair(predictions, rows)
        require_all(matched.unanswered)
        pairs = zip(rows, matched.texts, strict=True)
        answers = [{"questionId": row["question_id"], "answer": self.heard(text or "")} for row, text in pairs]
        return Submission(json.dumps(answers).encode(), len(rows), matched.ids())


@register_benchmark("docvqa")
class DocVqa(ReadingBenchmark):
    """Questions about scanned documents."""

    files = (
        "docvqa/DocVQA/validation-*.parquet",
        "docvqa/val_v1.0_withQT.json",
        "docvqa/DocVQA/test-*.parquet",
        "docvqa/test_v1.0.json",
    )
    image_folder = "docvqa"
    submission_size = 5_188
