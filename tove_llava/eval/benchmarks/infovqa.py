"""InfographicVQA (Mathew et al. 2022, arXiv 2104.12756): questions about infographics.

Files: lmms-lab's ``infovqa/InfographicVQA/*.parquet``, or the challenge's
``infovqa/infographicsVQA_val_v1.0_withQT.json`` and ``infovqa/infographicsvqa_images/``. Without a validation file the
test file is read.
"""

from tove_llava.eval.benchmarks import register_benchmark
from tove_llava.eval.benchmarks.docvqa import ReadingBenchmark


@register_benchmark("infovqa")
class InfoVqa(ReadingBenchmark):
    """Questions about infographics."""

    files = (
        "infovqa/InfographicVQA/validation-*.parquet",
        "infovqa/infographicsVQA_val_v1.0_withQT.json",
        "infovqa/InfographicVQA/test-*.parquet",
        "infovqa/infographicsVQA_test_v1.0.json",
    )
    image_folder = "infovqa/infographicsvqa_images"
    images = ("image", "image_local_name")
    submission_size = 3_288
