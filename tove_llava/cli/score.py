"""Score a predictions file against a ground-truth file, without any model.

Predictions are LLaVA's answer files (JSONL with question_id and text); where an id occurs twice, the last line counts.
Unanswered questions are reported and count as wrong.
"""

import argparse

HELP = "score a predictions file without a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tove_llava.eval.benchmarks import BENCHMARKS

    parser.add_argument("--benchmark", required=True, metavar="NAME", help=f"one of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--predictions", required=True, metavar="FILE", help="answers, JSONL")
    parser.add_argument("--ground-truth", required=True, metavar="FILE", help="the benchmark's ground truth")
    parser.add_argument("--json", action="store_true", help="print one JSON object with benchmark, scores and count")


def run(args: argparse.Namespace) -> int:
    import json

    from tove_llava.eval.benchmarks import get_benchmark
    from tove_llava.eval.report import score_table
    from tove_llava.eval.rows import read_answers

    benchmark = get_benchmark(args.benchmark)
    score = benchmark.score(read_answers(args.predictions), benchmark.read_ground_truth(args.ground_truth))
    if args.json:
        print(json.dumps(score.to_json(args.benchmark), ensure_ascii=False))
    else:
        print(score_table({args.benchmark: score}))
    return 0
