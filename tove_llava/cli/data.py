"""Check a LLaVA data set before training on it.

Every record is parsed, rendered and (with --tokenizer) measured, and every picture is decoded. Problems do not stop the
check; each is listed with its record. The exit code is 2 if there is any.
"""

import argparse
import json
import os
import sys
from typing import Any

HELP = "check a data set: records, placeholders, pictures, lengths"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help=HELP,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    check.add_argument("--data-path", required=True, metavar="FILE", help="LLaVA records, JSON or JSONL")
    check.add_argument("--image-folder", metavar="DIR", help="where the records' file names start")
    check.add_argument("--template", default="v1", help="conversation template (default: v1; stage 1 uses plain)")
    check.add_argument("--tokenizer", metavar="DIR", help="folder or source of a tokenizer, to measure lengths")
    check.add_argument("--model-max-length", type=int, default=2048, metavar="N", help="longest sequence (2048)")
    check.add_argument("--num-image-tokens", type=int, default=576, metavar="N", help="positions of a picture (576)")
    check.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes")
    check.add_argument("--no-decode", action="store_true", help="only look whether the pictures are there")
    check.add_argument("--allow-image-links", action="store_true", help="accept links that lead out of the folder")
    check.add_argument("--show", type=int, default=10, metavar="N", help="problems to print (10; the JSON has all)")
    check.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from tove_llava.data.check import CheckOptions, check_dataset
    from tove_llava.data.tokenizer import load_tokenizer

    options = CheckOptions(
        image_folder=args.image_folder,
        template=args.template,
        tokenizer=load_tokenizer(args.tokenizer) if args.tokenizer else None,
        num_image_tokens=args.num_image_tokens,
        model_max_length=args.model_max_length,
        decode=not args.no_decode,
        allow_image_links=args.allow_image_links,
    )

    def progress(items: Any, total: int, label: str) -> Any:
        return tqdm(items, total=total, desc=label, unit="", disable=not sys.stderr.isatty(), leave=False)

    report = check_dataset(args.data_path, options, args.workers, progress)
    print(json.dumps(report.to_dict(), ensure_ascii=False) if args.json else _table(report, args.show))
    return 2 if report.bad else 0


def _table(report: Any, show: int) -> str:
    rows: list[tuple[str, str]] = [
        ("records", f"{report.records:,}"),
        ("text only", f"{report.text_only:,}"),
        ("several images", f"{report.multi_image:,}"),
        ("most turns", f"{report.turns:,}"),
        ("picture files", f"{report.images:,}"),
    ]
    if report.image_modes:
        rows.append(("picture modes", ", ".join(f"{mode} {count:,}" for mode, count in report.image_modes.items())))
    if report.tokens:
        tokens = report.tokens
        rows.append(("sequence length", f"mean {tokens['mean']:,}, longest {tokens['max']:,}"))
        rows.append(("supervised tokens", f"mean {tokens['mean_supervised']:,}"))
        rows.append(("cut at the maximum", f"{tokens['truncated']:,}"))
    if report.duplicate_ids:
        rows.append(("repeated ids", f"{report.duplicate_ids:,} (harmless)"))
    rows += [(f"problems: {kind}", f"{count:,}") for kind, count in report.counts.items()]
    width = max(len(name) for name, _ in rows)
    lines = [report.file, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
    lines += [problem.message for problem in report.problems[:show]]
    if len(report.problems) > show:
        lines.append(f"... and {len(report.problems) - show:,} more; --show N prints N, --json all")
    lines.append(
        f"{report.bad:,} of {report.records:,} records cannot be trained on" if report.bad else "all records are good"
    )
    return "\n".join(lines)
