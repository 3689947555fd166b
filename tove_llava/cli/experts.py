"""List the vision experts, their costs, and which can be loaded here.

Costs are counted from configurations; GFLOPs are per image, two operations per multiply-add. Nothing is downloaded or
loaded. docs/reference/sources.md explains every form of source.
"""

import argparse
import json
from typing import Any

from tove_llava.core.text import aligned, number

HELP = "list the vision experts: source, tokens, width, parameters, GFLOPs, licence, loadable here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", help="list this preset's experts (name or YAML file) instead of every registered one"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    logging.set_verbosity_error()
    rows = [describe(entry) for entry in _entries(args.preset)]
    print(json.dumps(rows, indent=2) if args.json else table(rows))
    return 0


def _entries(preset: str | None) -> list[dict[str, Any]]:
    """List a preset's specs, or each registered expert and source."""
    from tove_llava.experts import EXPERTS

    if preset is not None:
        from tove_llava.presets import load_preset

        return list(load_preset(preset).vision.experts)
    entries = {}  # by name and source: one class may read several schemes
    for name in EXPERTS:
        for cls in EXPERTS.get(name).values():
            for source in (cls.default_source, *cls.further_sources):
                entries[name, source] = {"name": name, "source": source}
    return list(entries.values())


def describe(entry: dict[str, Any]) -> dict[str, Any]:
    """Describe an expert; values are None where its configuration cannot be read."""
    from tove_llava.core.errors import ToveError
    from tove_llava.core.licences import RANDOM
    from tove_llava.experts import EXPERTS, ExpertSpec, build_expert
    from tove_llava.experts.availability import availability
    from tove_llava.experts.cost import expert_cost

    spec = ExpertSpec.from_dict(entry)
    row: dict[str, Any] = {key: getattr(spec, key) for key in ("name", "expert", "source", "mode", "image_size")}
    row |= dict.fromkeys(("grid", "tokens", "width", "parameters", "gflops", "licence"))
    family = EXPERTS.get(spec.expert).values() if spec.expert in EXPERTS else ()
    row["remark"] = " ".join({cls.remark: None for cls in family if cls.remark})
    try:
        expert = build_expert(spec.replace(width=0, grid=(0, 0)))
        cost = expert_cost(expert)
        loadable, note = availability(expert)
    except ToveError as error:
        return {**row, "loadable": False, "note": str(error)}
    done = expert.spec
    return {
        **row,
        "source": done.source,
        "image_size": done.image_size,
        "grid": list(done.grid),
        "tokens": done.grid[0] * done.grid[1],
        "width": done.width,
        "parameters": cost.parameters,
        "gflops": round(cost.flops / 1e9, 3),
        "licence": RANDOM if expert.is_random else expert.licence(),
        "loadable": loadable,
        "note": note,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows, and below them why some experts cannot be loaded."""
    head = ["name", "source", "mode", "input", "tokens", "width", "params", "GFLOPs", "licence", "loadable"]
    lines = [head]
    for row in rows:
        size, grid, parameters = row["image_size"], row["grid"], row["parameters"]
        lines.append(
            [
                row["name"],
                row["source"],
                row["mode"],
                number(size, "d"),
                f"{grid[0]}x{grid[1]}" if grid else "-",
                number(row["width"], "d"),
                "-" if parameters is None else f"{parameters / 1e6:.1f}M",
                number(row["gflops"], ".4g"),
                row["licence"] or "-",
                f"yes ({row['note']})" if row["loadable"] else "no",
            ]
        )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row["loadable"]:
            reasons.setdefault(row["note"], []).append(row["name"])
    notes = [f"not loadable here: {', '.join(dict.fromkeys(names))}: {note}" for note, names in reasons.items()]
    notes += [f"{name}: {remark}" for name, remark in {r["name"]: r["remark"] for r in rows if r["remark"]}.items()]
    notes.append("any model of timm: {name: ANY, source: timm:MODEL}; every form of source: docs/reference/sources.md")
    return "\n".join([aligned(lines, left=len(head)), "", *notes])
