"""OK-VQA (Marino et al. 2019, arXiv 1906.00067): questions that need outside knowledge.

Layout, with the official files: ``okvqa/OpenEnded_mscoco_val2014_questions.json``,
``okvqa/mscoco_val2014_annotations.json`` and ``okvqa/val2014/COCO_val2014_<12 digits>.jpg``. Scored by the VQA
evaluation on each annotation's ``answer`` (the stemmed form), as its authors say.
"""

from pathlib import Path

from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json
from tove_llava.eval.benchmarks import SHORT_ANSWER, Question, register_benchmark
from tove_llava.eval.fields import TEXT, WHOLE, check_rows
from tove_llava.eval.rows import Row
from tove_llava.eval.vqa import VqaBenchmark


@register_benchmark("okvqa")
class OkVqa(VqaBenchmark):
    """Consensus accuracy, overall and per type of answer and question."""

    question_path = "okvqa/OpenEnded_mscoco_val2014_questions.json"

    def questions(self, root: Path) -> list[Question]:
        file = self.question_file(root)
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("questions"), list):
            raise DataError(f"{file} has no list of questions; give OK-VQA's question file")
        images = root / "okvqa" / "val2014"
        rows = check_rows(content["questions"], file, {"question_id": WHOLE, "image_id": WHOLE, "question": TEXT})
        return [
            Question(
                row["question_id"],
                f"{row['question']}\n{SHORT_ANSWER}",
                images / f"COCO_val2014_{row['image_id']:012d}.jpg",
            )
            for row in rows
        ]

    def ground_truth(self, root: Path) -> list[Row]:
        return self.read_ground_truth(root / "okvqa" / "mscoco_val2014_annotations.json")
