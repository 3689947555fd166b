"""List public data sets; check them, or a set of your own.

'data list' and 'data show NAME' say where LLaVA's benchmarks and training sets come from and where they belong.
'data check NAME' checks what is there; 'data check --data-path FILE' checks every record and image of a training set
of your own.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tove_llava.cli._flags import add_image_placeholder, add_template, check_least, prepared_template
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.text import aligned, listed

HELP = "list public data sets; check them, or a data set of your own"

_CHECK = """Check that data is complete and undamaged.

With names: every part, count, ground truth and image of public sets (see 'data list'; 'all': those of which a part is
there). With --data-path: every record of a training set of your own is parsed, rendered and (with --tokenizer)
measured, and every image is decoded. The check lists each problem with its file, record or question, and goes on. The
exit code is 2 if there is a problem.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = _action(actions, "list", "public data sets: how large, and whether they are there")
    show = _action(actions, "show", "one public data set: licence, downloads, layout")
    show.add_argument("names", nargs="+", metavar="NAME", help="see 'data list'")
    check = _action(actions, "check", "check that data is complete", _CHECK)
    for action in (listing, show, check):
        action.add_argument(
            "--data-root", metavar="DIR", help="folder of public sets (default: each set's, as in LLaVA)"
        )
        action.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _check_arguments(check)


def _action(actions: Any, name: str, summary: str, description: str | None = None) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name,
        help=summary,
        description=description or summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def _check_arguments(check: argparse.ArgumentParser) -> None:
    check.add_argument("names", nargs="*", metavar="NAME", help="public data sets, or all")
    check.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes")
    check.add_argument("--no-decode", action="store_true", help="only check that the images exist")
    check.add_argument("--allow-image-links", action="store_true", help="accept links that lead out of the folder")
    check.add_argument("--show", type=int, default=10, metavar="N", help="problems to print (10; the JSON has all)")
    own = check.add_argument_group("a training set of your own")
    own.add_argument("--data-path", metavar="FILE", help="records: JSON, JSONL, Parquet, Arrow")
    add_image_placeholder(own)
    own.add_argument("--image-folder", metavar="DIR", help="folder that image paths start from")
    add_template(own, "; stage 1 uses plain")
    own.add_argument("--tokenizer", metavar="DIR", help="folder or source of a tokenizer, to measure lengths")
    own.add_argument("--model-max-length", type=int, default=2048, metavar="N", help="longest sequence (2048)")
    own.add_argument("--image-size", type=int, default=336, metavar="N", help="pixels a side that training uses (336)")
    own.add_argument(
        "--image-aspect-ratio", choices=("square", "pad"), help="as in training (default: square for plain, else pad)"
    )
    own.add_argument("--num-image-tokens", type=int, default=576, metavar="N", help="tokens of an image (576)")


def run(args: argparse.Namespace) -> int:
    if args.action == "list":
        return _list(args)
    if args.action == "show":
        return _show(args)
    if bool(args.names) == bool(args.data_path):
        raise ConfigError("give either names of public data sets ('tove-llava data list') or --data-path")
    check_least(args, "--workers")
    return _check_public(args) if args.names else _check_own(args)


def _root(data_set: Any, args: argparse.Namespace) -> Path:
    return Path(args.data_root or data_set.root)


def _list(args: argparse.Namespace) -> int:
    from tove_llava.data.presence import present
    from tove_llava.data.sets import get_set, set_names

    sets = {name: get_set(name) for name in set_names()}
    there = {name: present(data_set, _root(data_set, args)) for name, data_set in sets.items()}
    if args.json:
        found = {name: {"parts": len(parts), "present": sum(parts)} for name, parts in there.items()}
        print(json.dumps({name: {**_facts(data_set), **found[name]} for name, data_set in sets.items()}))
        return 0
    lines = [["", "for", "questions", "parts there"]]
    for name, data_set in sets.items():
        count = "" if data_set.questions is None else f"{data_set.questions:,}"
        parts = f"{sum(there[name])} of {len(there[name])}"
        lines.append([name, data_set.kind, count, parts])
    titles = ["", "", *(data_set.title for data_set in sets.values())]
    table = zip(aligned(lines).splitlines(), titles, strict=True)
    print("\n".join(f"{row}  {title}".rstrip() for row, title in table))
    print("\n'tove-llava data show NAME' says where a set comes from, 'tove-llava data check NAME' checks it")
    return 0


def _facts(data_set: Any) -> dict[str, Any]:
    return {**asdict(data_set), "download_bytes": data_set.download_bytes}


def _show(args: argparse.Namespace) -> int:
    from tove_llava.data.sets import get_set

    sets = [get_set(name) for name in args.names]
    if args.json:
        print(json.dumps({data_set.name: _facts(data_set) for data_set in sets}, ensure_ascii=False))
    else:
        print("\n\n".join(_description(data_set, _root(data_set, args)) for data_set in sets))
    return 0


def _description(data_set: Any, root: Any) -> str:
    what = "questions" if data_set.kind == "benchmark" else "records"
    counts = [f"{data_set.questions:,} {what}"] if data_set.questions is not None else []
    counts += [f"{data_set.images:,} images"] if data_set.images is not None else []
    counts += [f"{name} {count:,}" for name, count in (data_set.groups or {}).items()]
    lines = [
        f"{data_set.name}: {data_set.title}",
        f"  home     {data_set.homepage}",
        f"  licence  {data_set.licence}",
        f"  size     {'; '.join([*counts, *([data_set.stated] if data_set.stated else [])]) or 'no source says'}",
        f"  under    {root}",
    ]
    for part in data_set.parts:
        lines.append(f"    {'[there]  ' if part.found(root) else '[missing]'} {part.path}")
        size = f" ({part.bytes / 1e9:.1f} GB)" if part.bytes else ""
        source = f"{part.archive}{size} from {part.url}" if part.archive else f"{part.url}{size}"
        lines += [f"              {text}" for text in (source, part.note, part.digest) if text]
    lines += [f"  note     {note}" for note in data_set.notes]
    lines += [f"  source   {source}" for source in data_set.sources]
    return "\n".join(lines)


def _check_public(args: argparse.Namespace) -> int:
    from tove_llava.data.presence import present
    from tove_llava.data.sets import get_set, set_names
    from tove_llava.eval.completeness import check_set

    names = set_names() if args.names == ["all"] else list(dict.fromkeys(args.names))
    sets = [get_set(name) for name in names]
    if args.names == ["all"]:
        sets = [data_set for data_set in sets if any(present(data_set, _root(data_set, args)))]
    if not sets:
        raise DataError("no public data set is there; see 'tove-llava data show NAME', or give --data-root")
    options = {"decode": not args.no_decode, "workers": args.workers, "allow_image_links": args.allow_image_links}
    reports = [check_set(data_set, _root(data_set, args), **options, progress=_progress) for data_set in sets]
    if args.json:
        print(json.dumps({report.name: report.to_dict() for report in reports}, ensure_ascii=False))
    else:
        print("\n\n".join(_report(report, args.show) for report in reports))
    return 2 if any(report.findings for report in reports) else 0


def _report(report: Any, show: int) -> str:
    counts = [f"{report.questions:,} questions"] if report.questions is not None else []
    counts += [f"{report.images:,} images"] if report.images is not None else []
    lines = [f"{report.name} under {report.root}: {', '.join(counts) or 'nothing to read'}"]
    lines += _first([f"  {finding.kind}: {finding.message}" for finding in report.findings], show, "  ")
    lines.append(f"  {len(report.findings):,} problems" if report.findings else "  complete")
    return "\n".join(lines)


def _check_own(args: argparse.Namespace) -> int:
    check_least(args, "--image-size")
    from tove_llava.data.check import CheckOptions, check_dataset
    from tove_llava.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    if tokenizer is not None:
        prepared_template(args, tokenizer)
    options = CheckOptions(
        image_folder=args.image_folder,
        template=args.template,
        tokenizer=tokenizer,
        num_image_tokens=args.num_image_tokens,
        model_max_length=args.model_max_length,
        decode=not args.no_decode,
        image_size=args.image_size,
        image_aspect_ratio=args.image_aspect_ratio,
        image_placeholder=args.image_placeholder,
        allow_image_links=args.allow_image_links,
    )
    report = check_dataset(args.data_path, options, args.workers, _progress)
    print(json.dumps(report.to_dict(), ensure_ascii=False) if args.json else _table(report, args.show))
    return 2 if report.bad else 0


def _progress(items: Any, total: int, label: str) -> Any:
    from tqdm import tqdm

    return tqdm(items, total=total, desc=label, unit="", disable=not sys.stderr.isatty(), leave=False)


def _table(report: Any, show: int) -> str:
    counts = {"records": report.records, "text only": report.text_only, "several images": report.multi_image}
    counts |= {"most turns": report.turns, "image files": report.images}
    rows = [(name, f"{count:,}") for name, count in counts.items()]
    if report.image_modes:
        rows.append(("image modes", ", ".join(f"{mode} {count:,}" for mode, count in report.image_modes.items())))
    if report.tokens:
        tokens = report.tokens
        rows.append(("sequence length", f"mean {tokens['mean']:,}, longest {tokens['max']:,}"))
        rows.append(("supervised tokens", f"mean {tokens['mean_supervised']:,}"))
        rows.append(("cut at the maximum", f"{tokens['truncated']:,}"))
    if report.duplicate_ids:
        rows.append(("repeated ids", f"{report.duplicate_ids:,} (harmless)"))
    if report.unread_keys:
        rows.append(("keys not read", ", ".join(f"{key} {count:,}" for key, count in report.unread_keys.items())))
    rows += [(f"problems: {kind}", f"{count:,}") for kind, count in report.counts.items()]
    lines = [report.file, *listed(rows), ""]
    lines += _first([problem.message for problem in report.problems], show)
    bad = f"{report.bad:,} of {report.records:,} records cannot be trained on"
    return "\n".join([*lines, bad if report.bad else "all records are good"])


def _first(lines: list[str], show: int, indent: str = "") -> list[str]:
    """Cut a list of problems, and say how many are left."""
    rest = f"{indent}... and {len(lines) - show:,} more; --show N prints N, --json all"
    return lines if len(lines) <= show else [*lines[:show], rest]
