"""Check the experts, fusions, templates and benchmarks of your own files against their contracts.

Every part that the files register is checked as tove_llava.testing does it: shapes, detached and unusable experts,
gradients, saving, supervision, scoring. A broken rule is named, with its file and line.
"""

import argparse
import sys

HELP = "check parts of your own (--plugin FILE.py) against their contracts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE.py", help="files to check, besides those of --plugin")
    parser.add_argument("--data-root", metavar="DIR", help="evaluation data; without it no benchmark is checked")
    parser.add_argument("--tokenizer", default="bundled:llm", help="tokenizer for templates (default: bundled:llm)")


def run(args: argparse.Namespace) -> int:
    from tove_llava.core.errors import ConfigError, ToveError
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.core.plugins import add_plugins
    from tove_llava.testing import own_parts

    quiet_transformers()
    add_plugins(args.files)
    parts = own_parts(args.data_root, args.tokenizer)
    if not parts:
        raise ConfigError("these files register no expert, fusion, template or benchmark: tove-llava check FILE.py")
    failed = 0
    for label, check in parts.items():
        if check is None:
            print(f"{label}: not checked; its data are needed: --data-root DIR")
            continue
        try:
            rules = check()
        except ToveError as error:
            failed += 1
            print(error, file=sys.stderr)
        else:
            print(f"{label} keeps its contract:", *(f"  * {rule}" for rule in rules), sep="\n")
    return 1 if failed else 0
