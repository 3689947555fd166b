"""The ``tove-llava`` command: each module of this package is one verb.

The verb ``some-verb`` is the file ``some_verb.py`` with three names:

    HELP = "one line, shown in the overview"          # a plain string literal: the overview reads it without importing
    def add_arguments(parser): ...                    # argparse
    def run(args) -> int: ...                         # the exit code

A file with ``PASSES_FLAGS_ON = True`` finds the flags that it does not know in ``args.passed_on``.

``run`` imports heavy libraries. Every verb takes ``--plugin FILE.py`` (:mod:`tove_llava.core.plugins`).

Exit codes: 0 done, 2 bad input (a :class:`~tove_llava.core.errors.ToveError`, printed without a traceback, or a wrong
flag), 130 interrupted.
"""

import argparse
import ast
import contextlib
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tove_llava.core.errors import ToveError
from tove_llava.core.logs import keep_stdout_clean
from tove_llava.core.plugins import FLAG, take_plugin_flags
from tove_llava.core.registry import closest
from tove_llava.core.text import has_encoding, listed
from tove_llava.core.version import __version__
from tove_llava.doctor.packages import remedy_of
from tove_llava.train.launcher import end_with_launcher

PROGRAM = "tove-llava"


def verbs() -> dict[str, Path]:
    """List the verbs and their files, sorted by name."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return {file.stem.replace("_", "-"): file for file in files if not file.stem.startswith("_")}


def verb_help(file: Path) -> str:
    """Read the ``HELP`` line of a verb's file without importing it."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["HELP"]:
            return str(ast.literal_eval(node.value))
    return ""


def overview() -> str:
    """Write the text of ``tove-llava --help``."""
    lines = "\n".join(listed((name, verb_help(file)) for name, file in verbs().items()))
    return f"""usage: {PROGRAM} VERB [options]

ToVE, vision experts in CLIP tokens, as a vision tower for LLaVA.

verbs:
{lines}

'{PROGRAM} VERB --help' explains one verb; '{PROGRAM} --version' prints the version."""


def build_parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """Build the parser of a verb; flags cannot be abbreviated."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=module.__doc__ or module.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    if parser.prefix_chars == "-":  # only for the help: main() has taken the flag out
        parser.add_argument(FLAG, action="append", metavar="FILE.py", help="load parts of your own; may be repeated")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code.

    Args:
        argv: the arguments after the program's name; ``sys.argv[1:]`` by default.
    """
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has gone
        _drop_output()
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        _drop_output()
        print(f"{PROGRAM}: {error.filename or 'the output'} could not be written: {error.strerror}", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """Drop what standard output still holds: Python would try to write it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stdin):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or file that is not UTF-8 is no reason for a traceback
            stream.reconfigure(errors="backslashreplace" if stream is sys.stdout else "surrogateescape")
    for argument in arguments:
        if not has_encoding(argument):
            print(f"{PROGRAM}: {argument!r} is not UTF-8 text; rename that file, or type it again", file=sys.stderr)
            return 2
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
        print(f"{PROGRAM}: unknown verb {name!r}.{closest(name, known)} Verbs: {', '.join(known)}", file=sys.stderr)
        return 2
    if sys.flags.optimize > 1:
        print(
            f"{PROGRAM}: transformers reads docstrings, which PYTHONOPTIMIZE=2 (-OO) removes; unset it", file=sys.stderr
        )
        return 2
    keep_stdout_clean()
    end_with_launcher()
    try:
        module = importlib.import_module(f"tove_llava.cli.{known[name].stem}")
        parser, rest = build_parser(name, module), take_plugin_flags(rest)
        if getattr(module, "PASSES_FLAGS_ON", False):
            args, passed_on = parser.parse_known_args(rest)
            args.passed_on = passed_on
        else:
            args = parser.parse_args(rest)
        for flag in ("model", "compare"):
            if str(getattr(args, flag, "")).startswith("hf:"):
                from tove_llava.checkpoints.hub import checkpoint_folder

                setattr(args, flag, str(checkpoint_folder(getattr(args, flag))))
        return int(module.run(args) or 0)
    except ToveError as error:
        print(f"{PROGRAM} {name}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        remedy = remedy_of(error.name)
        if remedy is None:
            raise
        if os.environ.get("RANK", "0") == "0":  # all ranks miss it
            print(f"{PROGRAM} {name}: {error.name} is not installed; install it: {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:  # a training's has words and a code of its own
        print(f"\n{PROGRAM} {name}: {str(error) or 'interrupted'}", file=sys.stderr)
        return getattr(error, "code", 130)
