"""Collect all targets of the benchmarks in one table.

The targets are those of targets.yaml. Values are those of ``record["targets"]`` in every JSON file of a folder of
results; ``SUMMARY.md`` and ``summary.json`` are written into it. A target counts as measured on the kind of device and
at the size that it is meant for; what was found elsewhere (a ratio of the ``tiny`` preset on a CPU, where the target is
one of a GPU) has a table of its own. A target that no result measures is a row too, with its command. What a benchmark
tried and could not measure is listed below with its reason.

    python benchmarks/summary.py [--output benchmarks/results]

run.sh gives it the seconds and exit codes of its benchmarks, which become one more result.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, Bench, argument_parser, circumstances, lost_table, run_command, targets_table, write_results
from common import target as measured

from tove_llava.core.errors import ConfigError
from tove_llava.core.text import markdown_table

TARGETS = Path(__file__).with_name("targets.yaml")
ALL = {"cuda": "bash benchmarks/run.sh gpu", "cpu": "bash benchmarks/run.sh cpu", "any": "bash benchmarks/run.sh cpu"}
ENTRY = {"name", "value", "target", "at_least"}  # and "reason", where a value is missing that was to be measured
RUN, MINUTES, PRESETS = "run", {"cpu": 9.0, "gpu": 16.0}, {"cpu": "tiny", "cuda": "vicuna-7b"}


@dataclass(frozen=True)
class Target:
    """One entry of targets.yaml, whose comments say what each key is."""

    key: str
    what: str
    than: str
    benchmark: str
    named: str
    command: str
    device: str
    preset: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    report: bool = False

    def __post_init__(self) -> None:
        given = (self.at_least is not None) + (self.at_most is not None) + self.report
        if given != 1 or self.device not in ALL:
            one = "one of at_least, at_most and report"
            raise ConfigError(f"{TARGETS}: {self.key}: give {one}, and a device of {', '.join(ALL)}")

    @property
    def wanted(self) -> float | None:
        return self.at_most if self.at_least is None else self.at_least

    @property
    def limit(self) -> str:
        if self.wanted is None:
            return "none"
        return f"{'≤' if self.at_least is None else '≥'} {self.wanted:g}"

    def is_named(self, record: dict[str, Any], entry: dict[str, Any]) -> bool:
        return record["benchmark"] == self.benchmark and re.fullmatch(self.named, entry["name"]) is not None

    def is_for(self, record: dict[str, Any]) -> bool:
        """Tell if the record is of the target's device and whole preset."""
        return (
            not record.get("experts_left_out")
            and self.device in ("any", record["device"]["type"])
            and self.preset in (None, record["preset"])
        )

    def state(self, value: float) -> str:
        if self.wanted is None:
            return "reported"
        met = value <= self.wanted if self.at_least is None else value >= self.wanted
        return "met" if met else "missed"


@dataclass(frozen=True)
class Row:
    """A target with one result's value; without a file, not measured."""

    target: Target
    state: str  # "met", "missed", "reported", "unmeasured", or "elsewhere" (not on the target's device or size)
    name: str | None = None
    value: float | None = None
    file: str | None = None
    preset: str | None = None
    device: str | None = None
    reason: str | None = None  # why it has no value, where its benchmark tried
    commit: str | None = None
    versions: dict[str, str] | None = None


def load_targets(file: Path = TARGETS) -> list[Target]:
    """Load targets; a missing or unknown key raises ConfigError."""
    try:
        return [Target(key=key, **entry) for key, entry in yaml.safe_load(file.read_text()).items()]
    except TypeError as error:
        raise ConfigError(f"{file}: {error}") from error


def collect(folder: Path, targets: Sequence[Target]) -> list[Row]:
    """Collect the rows of every target, in the order of ``targets``.

    Raises:
        ConfigError: a file that is not a benchmark's result, a target in it that ``targets`` does not list or that is
            another number there, or no result at all.
    """
    found: dict[str, list[Row]] = {target.key: [] for target in targets}
    files = _results(folder)
    if not files:
        raise ConfigError(f"{folder} holds no results; run '{ALL['cpu']}' first")
    for file in files:
        record = _read(file)
        for entry in record.get("targets", []):
            for target in _listed(file, record, entry, targets):
                if entry["value"] is not None:
                    state = target.state(entry["value"]) if target.is_for(record) else "elsewhere"
                    found[target.key].append(_row(target, state, _page(folder, file), record, entry))
                elif "reason" in entry and target.is_for(record):
                    found[target.key].append(_row(target, "unmeasured", _page(folder, file), record, entry))
    rows = []
    for target in targets:
        if not any(row.state != "elsewhere" for row in found[target.key]):
            rows.append(Row(target, "unmeasured"))
        rows += found[target.key]
    return rows


def _results(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*-*.json"))  # the parts of gpu.sh have folders of their own


def _page(folder: Path, file: Path) -> str:
    return file.relative_to(folder).with_suffix(".md").as_posix()


def _read(file: Path) -> dict[str, Any]:
    """Read a result, and check what is read of it here."""
    try:
        record = json.loads(file.read_text())
        record["benchmark"], record["preset"], record["device"]["type"], record["device"]["description"]
        entries = record.get("targets", [])
        odd = [e for e in entries if set(e) - {"reason"} != ENTRY or not isinstance(e["name"], str)]
        odd += [e for e in entries if not isinstance(e.get("reason", ""), str)]
        dict(record.get("not_measured", {})), record.get("seconds", 0.0) + 0.0
        numbers = [n for entry in entries for n in (entry.get("value"), entry.get("target")) if n is not None]
        if odd or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
            raise ConfigError(f"{file}: a target needs {sorted(ENTRY)}, a name and numbers; not so: {odd or numbers}")
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{file} is not a benchmark's result ({error!r}); take it out or measure again") from error
    return record


def _listed(file: Path, record: dict[str, Any], entry: dict[str, Any], targets: Sequence[Target]) -> list[Target]:
    """Return the named targets for this device and size, else others."""
    named = [target for target in targets if target.is_named(record, entry)]
    if not named:
        raise ConfigError(f"{file}: {TARGETS.name} lists no target of {record['benchmark']} named {entry['name']!r}")
    meant = [target for target in named if target.is_for(record)]
    for target in meant:
        if (entry["target"], entry["at_least"]) != (target.wanted, target.at_least is not None):
            told = f"{'≥' if entry['at_least'] else '≤'} {entry['target']}"
            raise ConfigError(f"{file}: {entry['name']!r} is {told} there and {target.limit} in {TARGETS.name}")
    return meant or named


def _row(target: Target, state: str, page: str, record: dict[str, Any], entry: dict[str, Any]) -> Row:
    return Row(
        target,
        state,
        name=entry["name"],
        value=entry["value"],
        file=page,
        preset=record["preset"],
        device=record["device"]["description"],
        reason=entry.get("reason"),
        commit=record.get("commit", "unknown"),
        versions=record.get("versions"),
    )


@dataclass(frozen=True)
class Taken:
    """A result's seconds and failures."""

    file: str
    seconds: float | None
    not_measured: dict[str, str]


def taken_by(folder: Path) -> list[Taken]:
    """List them for every result in a folder."""
    found = []
    for file in _results(folder):
        record = _read(file)
        found.append(Taken(_page(folder, file), record.get("seconds"), record.get("not_measured", {})))
    return found


def markdown(rows: Sequence[Row], taken: Sequence[Taken] = ()) -> str:
    """Format the rows as a page."""
    count = {state: sum(row.state == state for row in rows) for state in ("met", "missed", "unmeasured")}
    elsewhere = [row for row in rows if row.state == "elsewhere"]
    header = ["target", "compared with", "wanted", "measured", "", "on", "command"]
    parts = [
        "# Targets",
        f"Written by `python benchmarks/summary.py` from the results beside it: {count['met']} met, "
        f"{count['missed']} missed, {count['unmeasured']} unmeasured. All at once: `{ALL['cpu']}`, and on one GPU "
        f"`{ALL['cuda']}`. [NOTES.md](../NOTES.md) has the reasons.",
        markdown_table(header, [_cells(row) for row in rows if row.state != "elsewhere"]),
    ]
    if elsewhere:
        parts += [
            "## The same quantities on other devices and at other sizes",
            "These targets are for a GPU or for another preset; what is measured here says nothing of them.",
            markdown_table(
                ["target", "as measured here", "value", "preset", "on"],
                [
                    [row.target.what, str(row.name), f"{row.value:.3g}", f"`{row.preset}`", _link(row)]
                    for row in elsewhere
                ],
            ),
        ]
    lost = [[f"[`{one.file}`]({one.file})", part, why] for one in taken for part, why in one.not_measured.items()]
    if lost:
        parts += ["## Not measured", markdown_table(["file", "part", "why"], lost)]
    results = {row.file: row for row in rows if row.file is not None}
    seconds = {one.file: f"{one.seconds:.0f}" for one in taken if one.seconds is not None}
    files = [
        [_link(row, f"`{name}`"), str(row.device), seconds.get(name, ""), str(row.commit), ", ".join(_versions(row))]
        for name, row in results.items()
    ]
    return "\n\n".join(
        [*parts, "## Results", markdown_table(["file", "device", "seconds", "commit", "versions"], files)]
    )


def _cells(row: Row) -> list[str]:
    target = row.target
    command = f"`{target.command}`"
    if row.value is None:
        where = _meant(target) if row.reason is None else f"{row.reason} ({_link(row)})"
        return [target.what, target.than, target.limit, "", "unmeasured", where, command]
    several = f" ({row.name})" if ".*" in target.named else ""  # one target, a row for each of its names
    state = "**missed**" if row.state == "missed" else row.state
    return [target.what + several, target.than, target.limit, f"{row.value:.3g}", state, _link(row), command]


def _meant(target: Target) -> str:
    return {"cuda": "needs a GPU", "cpu": "a CPU", "any": ""}[target.device]


def _link(row: Row, text: str | None = None) -> str:
    return f"[{text or row.device}]({row.file})"


def _versions(row: Row) -> list[str]:
    return [f"{name} {version}" for name, version in (row.versions or {}).items() if version != "none"]


def write_run(output: Path, kind: str, seconds: float, codes: Sequence[str]) -> None:
    """Write the result of a whole run: its duration and failures.

    Args:
        kind: ``cpu`` or ``gpu``.
        codes: ``name=exit code`` of each benchmark.
    """
    device = {"cpu": "cpu", "gpu": "cuda"}[kind]
    flags = ["--device", device, "--preset", PRESETS[device], "--output", str(output)]
    try:
        ended = {name: int(code) for name, _, code in (text.partition("=") for text in codes)}
    except ValueError as error:
        raise ConfigError(f"--codes are name=number, not {' '.join(codes)!r}") from error
    try:
        parser = argument_parser("")
        parser.set_defaults(batch=None)
        record = Bench(parser.parse_args(flags)).record(RUN, "no")
    except ConfigError as error:  # no such device: its benchmarks have said so
        raise ConfigError(f"no result of the run: {error}") from error
    meaning = {1: "some parts were not measured", 2: "it could not be run"}
    record["not_measured"] = {
        f"{name}.py": f"exit code {code}: {meaning.get(code, 'it broke off')}" for name, code in ended.items() if code
    }
    record["targets"] = [measured(f"minutes of benchmarks/run.sh {kind}", seconds / 60, MINUTES[kind], at_least=False)]
    page = [f"# A whole run: {', '.join(ended)}", circumstances(record), *lost_table(record)]
    write_results(output, record, "\n\n".join([*page, targets_table(record["targets"])]), show=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--run", choices=("cpu", "gpu"), help="which benchmarks run.sh has just run")
    parser.add_argument("--seconds", type=float, default=0.0, metavar="X", help="that they took")
    parser.add_argument("--codes", nargs="*", default=[], metavar="NAME=CODE", help="their exit codes")
    args = parser.parse_args(argv)

    def write() -> None:
        if args.run is not None:
            write_run(args.output, args.run, args.seconds, args.codes)
        rows = collect(args.output, load_targets())
        page = markdown(rows, taken_by(args.output))
        (args.output / "SUMMARY.md").write_text(page + "\n")
        (args.output / "summary.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        print(page)

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
