"""Small runs of the programs in benchmarks/.

Tests can import these programs (pyproject.toml).
"""

import json
from pathlib import Path

from common import Bench, argument_parser

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"

BRIEF = ["--device", "cpu", "--repeats", "2", "--warmup", "1"]


def run(program, folder, *flags, code=0):
    """Run a program's command line; return its record and its page."""
    assert program.main([*BRIEF, *flags, "--output", str(folder)]) == code
    (file,) = folder.glob(f"{program.__name__}-*.json")
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


def bench(*flags, **defaults):
    """Return what a program has after it has read its flags."""
    parser = argument_parser("", limit=True)
    parser.set_defaults(**{"device": "cpu", "batch": 2, **defaults})
    return Bench(parser.parse_args(flags))


def median(row):
    return row["wall_seconds"]["median"]
