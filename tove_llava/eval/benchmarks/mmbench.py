"""MMBench, English: LLaVA's layout, ``mmbench/mmbench_dev_20230712.tsv``."""

from tove_llava.eval.benchmarks import OPTION_LETTER, register_benchmark
from tove_llava.eval.mmbench import MmBenchmark


@register_benchmark("mmbench")
class MmBench(MmBenchmark):
    """Multiple-choice questions on twenty abilities."""

    folder = "mmbench"
    sheet = "mmbench_dev_20230712.tsv"
    request = OPTION_LETTER
