"""Train one stage of a preset."""

import argparse

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

        return run_as_process(args.arguments)
