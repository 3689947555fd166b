"""Score a predictions file against a ground-truth file, without a model.

Predictions are LLaVA's answer files (JSONL with question_id and text); of lines with one id the last counts. Unanswered
questions are reported and count as wrong. The ground truth is the benchmark's own file, or the folder of all
benchmarks' data (LLaVA's playground/data/eval).
"""

import argparse

HELP = "score a predictions file without a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tove_llava.eval import judge
    from tove_llava.eval.benchmarks import BENCHMARKS
    from tove_llava.eval.rules import RULES

    parser.add_argument("--benchmark", metavar="NAME", help=f"one of: {', '.join(BENCHMARKS)}; or one of your own")
    parser.add_argument("--predictions", required=True, metavar="FILE", help="answers, JSONL")
    parser.add_argument("--ground-truth", metavar="FILE", help="the benchmark's ground truth")
    parser.add_argument("--questions", metavar="FILE", help="your own file of questions with right answers, instead")
    rule = f"another published reading of the benchmark's rule; for your own: {', '.join(RULES)}, caption or judge"
    parser.add_argument("--rule", metavar="NAME", help=rule)
    parser.add_argument("--json", action="store_true", help="print one JSON object with benchmark, scores and count")
    parser.add_argument("--per-item", action="store_true", help="with --json: also each answer as it was read")
    judge.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from tove_llava.core.errors import ConfigError, DataError
    from tove_llava.eval.judge import JudgedBenchmark, judge_from
    from tove_llava.eval.own_questions import any_benchmark, from_file
    from tove_llava.eval.rows import read_answers
    from tove_llava.eval.score_table import notes, score_table

    if args.questions:
        if args.benchmark or args.ground_truth:
            raise ConfigError("--questions holds the right answers too; leave out --benchmark and --ground-truth")
        args.benchmark, benchmark, _ = from_file(args.questions, None, args.rule)
        args.ground_truth = args.questions
    elif not args.benchmark or not args.ground_truth:
        raise ConfigError("give --benchmark and --ground-truth, or --questions and --rule")
    else:
        benchmark = any_benchmark(args.benchmark, [args.ground_truth], args.rule)
    benchmark.check_requirements()
    if isinstance(benchmark, JudgedBenchmark):
        benchmark.judge = judge_from(args, Path(args.predictions))
    elif args.judge_url or args.judge_model:
        raise ConfigError(f"{args.benchmark} is scored without a judge; leave out --judge-url and --judge-model")
    place = Path(args.ground_truth)
    truth = benchmark.ground_truth(place) if place.is_dir() else benchmark.read_ground_truth(place)
    if truth is None:
        raise DataError(
            f"{place} has no answers to {args.benchmark}'s questions: only its server scores them. "
            "'tove-llava submission' writes the file to send"
        )
    score = benchmark.score(read_answers(args.predictions), truth)
    if args.json:
        # ASCII, because an answer may hold half a surrogate pair, which no encoding takes.
        print(json.dumps(score.to_json(args.benchmark, args.per_item)))
    else:
        print("\n".join([score_table({args.benchmark: score}), *notes(score)]))
    return 0
