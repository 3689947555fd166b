"""Train one stage of a preset."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tove_llava.eval.training_benchmarks import TrainingBenchmarks

HELP = "train one stage of a preset in this process ('launch' starts one for each GPU)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # The trainer parses every flag; it knows the hundred flags of transformers.
    parser.prefix_chars = "\0"
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> int:
    from tove_llava.train import flags
    from tove_llava.train.interrupts import watching

    if {"-h", "--help"} & set(args.arguments):
        print(flags.help_page())
        return 0
    flags.refuse_mistyped(args.arguments)
    with watching():  # importing takes a while
        from tove_llava.train.run import run_as_process

        return run_as_process(args.arguments, read_benchmarks)


def read_benchmarks(names: str, limit: int, root: str | None, batch_size: int) -> "TrainingBenchmarks":
    """Read the benchmarks that a model answers while it trains."""
    from tove_llava.cli.eval import DATA_ROOTS
    from tove_llava.eval.training_benchmarks import TrainingBenchmarks

    return TrainingBenchmarks(names, limit, DATA_ROOTS if root is None else [root], batch_size)
