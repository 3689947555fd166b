"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837): open questions about COCO pictures, ten human answers each.

LLaVA's layout: ``vqav2/llava_vqav2_mscoco_test-dev2015.jsonl`` (questions with the whole prompt) and
``vqav2/test2015/``. The test answers are not public: the server scores them. For a split with public answers,
``tove-llava score`` reads the official annotation file.
"""

from pathlib import Path

from tove_llava.eval.benchmarks import Question, register_benchmark
from tove_llava.eval.layout import read_questions
from tove_llava.eval.rows import Row
from tove_llava.eval.vqa import VqaBenchmark


@register_benchmark("vqav2")
class Vqav2(VqaBenchmark):
    """Consensus accuracy, overall and per type of answer and question."""

    def question_file(self, root: Path) -> Path:
        return root / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl"

    def questions(self, root: Path) -> list[Question]:
        return read_questions(self.question_file(root), root / "vqav2" / "test2015")

    def ground_truth(self, root: Path) -> list[Row] | None:
        return None
