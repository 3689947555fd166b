"""Compare runs of 'tove-llava eval' side by side.

Writes OUT/report.html (one file, nothing else needed), OUT/report.md with OUT/pictures, and OUT/report.json: scores per
benchmark and category, bootstrap confidence intervals, paired tests against the first run, and the questions on which
runs differ, with images. Published figures of papers are marked as published.
"""

import argparse

from tove_llava.cli._flags import check_least, split_names
from tove_llava.core.errors import ConfigError
from tove_llava.core.text import listed

HELP = "compare runs: intervals, paired tests, and the questions on which they differ"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="[NAME=]DIR",
        help="a model's folder, its eval folder, or one benchmark's; the others are compared with the first",
    )
    parser.add_argument("--out", metavar="DIR", help="new folder to write")
    parser.add_argument("--baseline", metavar="NAME", help="compare with this run instead of the first")
    parser.add_argument("--benchmark", metavar="A,B", default="", help="only these benchmarks (default: all found)")
    parser.add_argument("--conditions", metavar="A,B", default="", help="only these conditions (default: all found)")
    parser.add_argument(
        "--published", default="all", metavar="A,B", help="published figures to show: all (default), none, or names"
    )
    parser.add_argument("--list-published", action="store_true", help="print the models with published figures")
    parser.add_argument("--differences", type=int, default=20, metavar="N", help="differing questions per pair (20)")
    parser.add_argument("--thumbnail", type=int, default=160, metavar="PX", help="longer side of images; 0: none")
    parser.add_argument("--data-root", metavar="DIR", help="where the images lie, if not where a run recorded")
    parser.add_argument("--resamples", type=int, default=10_000, metavar="N", help="bootstrap resamples (10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (0)")
    parser.add_argument("--json", action="store_true", help="print the comparison as one JSON object")


def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from tove_llava.eval.report.published import read_published
    from tove_llava.eval.report.write import Options, write_report

    if args.list_published:
        models = read_published().items()
        rows = ((key, f"{model.name}: {', '.join(model.scores)}  (arXiv {model.arxiv})") for key, model in models)
        print("\n".join(listed(rows)))
        return 0
    if not args.runs or args.out is None:
        raise ConfigError("give at least one folder with results, and --out for the new folder")
    check_least(args, "--differences", "--thumbnail", "--seed", least=0)
    check_least(args, "--resamples", least=100)
    keys = ("baseline", "published", "differences", "thumbnail", "data_root", "resamples", "seed")
    options = Options(
        benchmarks=tuple(split_names(args.benchmark)),
        conditions=tuple(split_names(args.conditions)),
        **{key: getattr(args, key) for key in keys},
    )
    record = write_report(args.runs, Path(args.out), options)
    print(json.dumps(record) if args.json else f"{args.out}/report.html\n{args.out}/report.md")
    return 0
