"""MMBench, Chinese: LLaVA's layout, ``mmbench_cn/mmbench_dev_cn_20231003.tsv``."""

from tove_llava.eval.benchmarks import register_benchmark
from tove_llava.eval.benchmarks.mmbench import MmBenchmark


@register_benchmark("mmbench_cn")
class MmBenchCn(MmBenchmark):
    """MMBench's questions in Chinese."""

    question_path = "mmbench_cn/mmbench_dev_cn_20231003.tsv"
    request = "请直接回答选项字母。"
