"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837): questions about COCO images.

LLaVA's layout: ``vqav2/llava_vqav2_mscoco_test-dev2015.jsonl`` (questions with the whole prompt) and
``vqav2/test2015/``. The test answers are not public: the server scores them. For a split with public answers,
``tove-llava score`` reads the official annotation file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.eval.benchmarks import register_benchmark
from tove_llava.eval.rows import Row
from tove_llava.eval.server_files import Submission, Submitting, normalised_answers
from tove_llava.eval.vqa import VqaBenchmark


@register_benchmark("vqav2")
class Vqav2(VqaBenchmark, Submitting):
    """Consensus accuracy, overall and per type of answer and question."""

    question_path = "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl"
    image_folder = "vqav2/test2015"
    submission_size = 447_793

    def ground_truth(self, root: Path) -> list[Row] | None:
        return None

    def submission_questions(self, root: Path) -> Path:
        # The server wants the whole test set, with empty answers outside test-dev.
        return root / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl"

    def submission(self, predictions: Sequence[Mapping[str, Any]], questions: Path | None) -> Submission:
        return normalised_answers(predictions, questions, "question_id")
