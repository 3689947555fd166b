"""All targets of the benchmarks in one table: wanted, measured, met or not, and where.

Reads ``record["targets"]`` of every JSON file of a folder of results and writes ``SUMMARY.md`` and ``summary.json``
into it. A target that was measured on one kind of machine alone has one row; a target that none could measure is a row
too, with the command that measures it.

    python benchmarks/summary.py [--output benchmarks/results]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, run_command, table

from tove_llava.errors import ConfigError

ON_A_GPU = "bash benchmarks/run.sh gpu"
_KEYS = {"name", "value", "target", "at_least"}
Row = dict[str, Any]


def collect(folder: Path) -> list[Row]:
    """One row a target.

    Raises:
        ConfigError: a file that is not a benchmark's result, or no result at all.
    """
    rows: dict[tuple[str, ...], Row] = {}
    for file in sorted(folder.glob("*-*.json")):
        record = _read(file)
        for entry in record.get("targets", []):
            if set(entry) != _KEYS:
                raise ConfigError(f"{file}: a target has the keys {sorted(entry)}, not {sorted(_KEYS)}")
            key = (record["benchmark"], entry["name"])
            row = {
                "benchmark": record["benchmark"],
                **entry,
                "state": _state(entry),
                "file": file.with_suffix(".md").name,
                "device": record["device"]["description"],
                "commit": record.get("commit", "unknown"),
            }
            if key not in rows or rows[key]["value"] is None:
                rows[key] = row
            elif row["value"] is not None:  # measured on two machines: both are told
                rows[(*key, file.stem)] = row
    if not rows:
        raise ConfigError(f"{folder} holds no result with targets; run 'bash benchmarks/run.sh cpu' first")
    return list(rows.values())


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
        record["benchmark"], record["device"]["description"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not a benchmark's result ({error!r}); take it out or measure again") from error
    return record


def _state(entry: Row) -> str:
    value, wanted = entry["value"], entry["target"]
    if value is None:
        return "unmeasured"
    return "met" if (value >= wanted if entry["at_least"] else value <= wanted) else "missed"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a page."""
    shown = [
        [
            row["benchmark"],
            row["name"],
            f"{'≥' if row['at_least'] else '≤'} {row['target']:g}",
            "" if row["value"] is None else f"{row['value']:.3g}",
            {"met": "met", "missed": "**missed**"}.get(row["state"], f"unmeasured: `{ON_A_GPU}`"),
            "" if row["value"] is None else f"[{row['device']}]({row['file']})",
            row["commit"],
        ]
        for row in rows
    ]
    count = {state: sum(row["state"] == state for row in rows) for state in ("met", "missed", "unmeasured")}
    return "\n\n".join(
        [
            "# Targets",
            f"Written by `python benchmarks/summary.py`: {count['met']} met, {count['missed']} missed, "
            f"{count['unmeasured']} that need a GPU and were not measured. [NOTES.md](../NOTES.md) "
            "has the reasons.",
            table(["benchmark", "what", "target", "measured", "", "on", "commit"], shown),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args(argv)

    def write() -> None:
        rows = collect(args.output)
        page = markdown(rows)
        (args.output / "SUMMARY.md").write_text(page + "\n")
        (args.output / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(page)

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
