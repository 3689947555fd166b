"""Answer benchmarks with a model and score the answers.

A run that was killed goes on where it stopped when the same command is given again. Several GPUs (or processes):
torchrun --nproc-per-node 8 -m tove_llava eval ...
"""

import argparse

from tove_llava.cli._loading import add_loading_arguments, loading_options

HELP = "answer benchmarks with a model and score the answers"

# Where LLaVA keeps its evaluation data, and where `tove-llava scenes` writes.
DATA_ROOTS = ("playground/data/eval", "playground/data/scenes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tove_llava.eval import judge
    from tove_llava.eval.benchmarks import BENCHMARKS
    from tove_llava.eval.conditions import CONDITIONS

    parser.add_argument("--model", required=True, metavar="DIR", help="folder that training wrote")
    parser.add_argument(
        "--benchmark", required=True, metavar="A,B", help=f"one or several of: {', '.join(BENCHMARKS)}; or all"
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help=f"evaluation data (default: the first with the data of {', '.join(DATA_ROOTS)})",
    )
    parser.add_argument("--output", metavar="DIR", help="answers and results (default: MODEL/eval)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="questions in the model at a time (default: 32); halved by itself when the GPU's memory is full",
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads that open pictures (default: 4)")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="answer about N questions of each benchmark, evenly spread; what is scored together stays together (the "
        "two questions about a picture of MME, the rotations of MMBench)",
    )
    decoding = parser.add_argument_group("decoding", "each benchmark's own, LLaVA's, unless given here")
    decoding.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer")
    decoding.add_argument("--temperature", type=float, metavar="T", help="0 (greedy) in LLaVA's scripts")
    decoding.add_argument("--top-p", type=float, metavar="P", help="draw from the most likely words with this share")
    decoding.add_argument("--num-beams", type=int, metavar="N", help="beam search")
    decoding.add_argument(
        "--conv-mode", metavar="NAME", help="conversation template (default: the one that the model was trained with)"
    )
    decoding.add_argument(
        "--score-options",
        metavar="NAME",
        help="multiple choice: do not generate, but take the option whose letter (likelihood) or whose words, by their "
        "mean per token (likelihood_text), the model would most likely say",
    )
    parser.add_argument("--blank-image", action="store_true", help="replace every image by the mean colour")
    parser.add_argument("--detach", metavar="A,B", help="take these experts out of the tower; or all")
    parser.add_argument(
        "--conditions", metavar="A,B", help=f"answer once under each of: {', '.join(CONDITIONS)}; one table"
    )
    parser.add_argument("--overwrite", action="store_true", help="throw away the answers of an earlier run")
    add_loading_arguments(parser)
    judge.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    from functools import partial

    from tove_llava.core.errors import ConfigError
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.eval.conditions import parse_conditions
    from tove_llava.eval.evaluate import evaluate
    from tove_llava.eval.judge import judge_from

    numbers = {"--batch-size": args.batch_size, "--limit": args.limit, "--workers": args.workers}
    for flag, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be at least 1, not {value}")
    if (args.judge_url or args.judge_model) and not _judged(args.benchmark):
        raise ConfigError(f"{args.benchmark} is scored without a judge; leave out --judge-url and --judge-model")
    quiet_transformers()
    text = evaluate(
        model_folder=args.model,
        benchmarks=args.benchmark,
        data_roots=[args.data_root] if args.data_root else DATA_ROOTS,
        output=args.output,
        conditions=parse_conditions(args.conditions, args.blank_image, args.detach),
        batch_size=args.batch_size,
        limit=args.limit,
        overwrite=args.overwrite,
        **loading_options(args),
        as_json=args.json,
        decoding={
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "num_beams": args.num_beams,
        },
        conv_mode=args.conv_mode,
        score_options=args.score_options,
        workers=args.workers,
        judge=partial(judge_from, args),
    )
    if text is not None:
        print(text)
    return 0


def _judged(benchmarks: str) -> bool:
    """Whether any of the benchmarks needs a judge."""
    from tove_llava.eval.benchmarks import BENCHMARKS
    from tove_llava.eval.judge import JudgedBenchmark

    names = [name.strip() for name in benchmarks.split(",") if name.strip()]
    return names == ["all"] or any(issubclass(BENCHMARKS.get(name), JudgedBenchmark) for name in names)
