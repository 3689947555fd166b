"""Answer benchmarks with a model and score the answers.

The same command continues a run that was interrupted. Several GPUs (or processes):
torchrun --nproc-per-node 8 -m tove_llava eval ...
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tove_llava.cli._flags import add_loading, add_model, check_least, loading_options, split_names

if TYPE_CHECKING:
    from tove_llava.eval.own_questions import Found

HELP = "answer benchmarks with a model and score the answers"

# Where LLaVA keeps its evaluation data, and where `tove-llava scenes` writes.
DATA_ROOTS = ("playground/data/eval", "playground/data/scenes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tove_llava.eval import judge
    from tove_llava.eval.benchmarks import BENCHMARKS
    from tove_llava.eval.conditions import CONDITIONS
    from tove_llava.eval.rules import RULES

    add_model(parser)
    parser.add_argument(
        "--benchmark",
        metavar="A,B",
        default="",
        help=f"one or several of: {', '.join(BENCHMARKS)}; a folder with a benchmark.yaml in the data root; or all",
    )
    own = parser.add_argument_group("questions of your own")
    own.add_argument("--questions", metavar="FILE", help="JSONL or JSON with question, image and answer of each")
    own.add_argument("--rule", metavar="NAME", help=f"how answers are scored: {', '.join(RULES)}, caption or judge")
    own.add_argument("--image-folder", metavar="DIR", help="what image names are relative to (default: this folder)")
    own.add_argument("--prompt", metavar="TEXT", help="ends each question (default: the rule's request)")
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
        help="questions in the model at a time (default: 32); halved when the GPU's memory is full",
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads that open images (default: 4)")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="answer about N questions of each benchmark, evenly spread; those scored together (an image of MME, "
        "the rotations of MMBench) stay together",
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
        help="multiple choice: do not generate; take the option whose letter (likelihood) or whose words, by their "
        "mean per token (likelihood_text), are most likely",
    )
    parser.add_argument("--blank-image", action="store_true", help="replace every image by the mean colour")
    parser.add_argument("--detach", metavar="A,B", help="detach these experts, or all; clip zeroes CLIP's tokens")
    parser.add_argument(
        "--conditions", metavar="A,B", help=f"answer once under each of: {', '.join(CONDITIONS)}; one table"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the answers of an earlier run")
    add_loading(parser)
    judge.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    import json
    from functools import partial

    from tove_llava.core.errors import ConfigError
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.eval.conditions import parse_conditions
    from tove_llava.eval.evaluate import Evaluation, evaluate
    from tove_llava.eval.judge import judge_from
    from tove_llava.eval.own_questions import from_file

    check_least(args, "--batch-size", "--limit", "--workers")
    if not args.benchmark and not args.questions:
        raise ConfigError("give --benchmark a name, or --questions a file of your own")
    if args.questions is None and any(value is not None for value in (args.rule, args.image_folder, args.prompt)):
        raise ConfigError(
            "--rule, --image-folder and --prompt belong to --questions; 'tove-llava score --rule' scores answers again"
        )
    own = [from_file(args.questions, args.image_folder, args.rule, args.prompt)] if args.questions else []
    roots = [args.data_root] if args.data_root else DATA_ROOTS
    if (args.judge_url or args.judge_model) and not _judged(args.benchmark, own, roots):
        raise ConfigError(
            f"{args.benchmark or args.questions} is scored without a judge; leave out --judge-url and --judge-model"
        )
    quiet_transformers()
    evaluation = Evaluation(
        model=args.model,
        benchmarks=args.benchmark,
        data_roots=roots,
        conditions=parse_conditions(args.conditions, args.blank_image, args.detach),
        output=args.output,
        batch_size=args.batch_size,
        limit=args.limit,
        overwrite=args.overwrite,
        decoding={key: getattr(args, key) for key in ("max_new_tokens", "temperature", "top_p", "num_beams")},
        conv_mode=args.conv_mode,
        score_options=args.score_options,
        workers=args.workers,
        judge=partial(judge_from, args),
        loading=loading_options(args),
        own=own,
    )
    found = evaluate(evaluation)
    if found is not None:
        results, tables = found
        print(json.dumps(results, ensure_ascii=False) if args.json else tables)
    return 0


def _judged(benchmarks: str, own: "Sequence[Found]", roots: Sequence[str]) -> bool:
    """Return True when any of the benchmarks needs a judge."""
    from tove_llava.eval.judge import JudgedBenchmark
    from tove_llava.eval.own_questions import any_benchmark

    names = split_names(benchmarks)
    if names == ["all"]:
        return True
    asked = [*(any_benchmark(name, roots) for name in names), *(benchmark for _, benchmark, _ in own)]
    return any(isinstance(benchmark, JudgedBenchmark) for benchmark in asked)
