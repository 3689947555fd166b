"""The ``tove-llava`` command: each module of this package is one verb.

A verb ``some-verb`` is the file ``some_verb.py`` with three module-level names::

    HELP = "one line, shown in the overview"          # a plain string literal: the overview reads it without importing
    def add_arguments(parser): ...                    # argparse
    def run(args) -> int: ...                         # the exit code

Heavy libraries are imported inside ``run``. Exit codes: 0 done, 2 bad input (:class:`~tove_llava.core.errors.ToveError`
or a wrong flag; the message goes to stderr without a traceback), 130 interrupted.
"""

import argparse
import ast
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tove_llava.core.errors import ToveError
from tove_llava.core.logs import keep_stdout_clean
from tove_llava.core.text import listed
from tove_llava.core.version import __version__

PROGRAM = "tove-llava"


def verbs() -> dict[str, Path]:
    """Every verb and the file that defines it, sorted by name."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return {file.stem.replace("_", "-"): file for file in files if not file.stem.startswith("_")}


def verb_help(file: Path) -> str:
    """The ``HELP`` line of a verb's file, read without importing it."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "HELP" for target in targets):
            return str(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    return ""


def overview() -> str:
    """What ``tove-llava --help`` prints."""
    lines = listed((name, verb_help(file)) for name, file in verbs().items())
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB [options]",
            "",
            "ToVE, vision experts in CLIP tokens, as a vision tower for LLaVA.",
            "",
            "verbs:",
            *lines,
            "",
            f"'{PROGRAM} VERB --help' explains one verb; '{PROGRAM} --version' prints the version.",
        ]
    )


def build_parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """The argument parser of one verb. Flags must be written out: an abbreviation could change its meaning later."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=module.__doc__ or module.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code.

    Args:
        argv: the arguments after the program's name; ``sys.argv[1:]`` by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(overview(), file=sys.stderr)
        return 2
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return 0
    known = verbs()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"{PROGRAM}: unknown verb {name!r}.{hint} Verbs: {', '.join(known)}", file=sys.stderr)
        return 2
    keep_stdout_clean()
    try:
        module = importlib.import_module(f"tove_llava.cli.{known[name].stem}")
        args = build_parser(name, module).parse_args(rest)
        return int(module.run(args) or 0)
    except ToveError as error:
        print(f"{PROGRAM} {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{PROGRAM} {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
