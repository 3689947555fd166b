"""Results of ``tove-llava eval``: a folder per benchmark with ``result.json`` and ``items.jsonl``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.files import read_json
from tove_llava.eval.result_files import ITEMS, RESULT
from tove_llava.eval.rows import read_jsonl

_PLACES = ("", "*", "*/*", "eval/*", "eval/*/*")  # of result.json under the folder that a user names


@dataclass(frozen=True)
class Item:
    """A question and a run's values on it; fields as in ``items.jsonl``."""

    name: str
    values: Mapping[str, float]
    groups: Mapping[str, Sequence[str]]
    prompt: str | None
    image: str | None
    answer: str | None
    expected: str | None

    @property
    def asked(self) -> tuple[Any, ...]:
        """Identify the question across runs."""
        return self.prompt, self.image, self.expected

    @property
    def group(self) -> tuple[str, str]:
        """Identify the image, about which there may be other questions; without one, the question."""
        return ("image", self.image) if self.image is not None else ("item", self.name)


@dataclass(frozen=True)
class Run:
    """One model's result on one benchmark.

    Attributes:
        label: the column's heading.
        rows: the official scores: label -> (value, questions).
        items: name -> item, in file order; empty where the score has none.
        result: the whole of ``result.json``.
    """

    label: str
    folder: Path
    benchmark: str
    rows: Mapping[str, tuple[float, int]]
    items: Mapping[str, Item]
    result: Mapping[str, Any]

    @property
    def metrics(self) -> list[str]:
        """Return the names of the values that every item has."""
        return list(next(iter(self.items.values())).values) if self.items else []


def read_runs(sources: Sequence[str], benchmarks: Sequence[str] = (), conditions: Sequence[str] = ()) -> list[Run]:
    """Read all results under the folders.

    Args:
        sources: ``FOLDER`` or ``LABEL=FOLDER``: a model's folder, its ``eval`` folder, or one benchmark's.
        benchmarks: keep these; all by default.
        conditions: keep these conditions; all by default.

    Raises:
        DataError: a folder has no result, or a file is malformed.
        ConfigError: two runs would have the same heading, or nothing is kept.
    """
    runs = []
    for source in sources:
        label, _, name = source.rpartition("=")
        folder = Path(name)
        files = sorted({file for place in _PLACES for file in folder.glob(f"{place}/{RESULT}".lstrip("/"))})
        if not files:
            raise DataError(f"{folder} has no {RESULT}; give a folder that 'tove-llava eval' wrote its results to")
        read = [read_run(file.parent, label) for file in files]
        runs += [
            run
            for run in read
            if (not benchmarks or run.benchmark in benchmarks)
            and (not conditions or run.result["condition"]["name"] in conditions)
        ]
    if not runs:
        found = ", ".join(benchmarks) or "any"
        raise ConfigError(f"no result of benchmark {found} under {', '.join(sources)} with those conditions")
    seen: dict[tuple[str, str], Path] = {}
    for run in runs:
        other = seen.setdefault((run.benchmark, run.label), run.folder)
        if other != run.folder:
            raise ConfigError(
                f"{other} and {run.folder} are both called {run.label!r}; give them names: NAME={run.folder}"
            )
    return runs


def read_run(folder: Path, label: str = "") -> Run:
    """Read one benchmark's result.

    Args:
        label: the model's name; by default, its folder's. A condition other than the plain one is added to it.

    Raises:
        DataError: a file is missing or malformed.
    """
    file = folder / RESULT
    result = read_json(file)
    needed = {"benchmark": str, "model": str, "rows": dict, "condition": dict, "data": dict, "count": int}
    for key, kind in needed.items():
        if not isinstance(result, dict) or not isinstance(result.get(key), kind):
            raise DataError(f"{file} has no {key!r} of the right type; was it written by 'tove-llava eval'?")
    condition = result["condition"]
    if not isinstance(condition.get("name"), str) or not isinstance(condition.get("title"), str):
        raise DataError(f"{file}: the condition needs a name and a title")
    rows = {}
    for name, pair in result["rows"].items():
        if not isinstance(pair, list) or len(pair) != 2 or not all(_is_number(value) for value in pair):
            raise DataError(f"{file}: row {name!r} must be a value and a number of questions, not {pair!r:.80}")
        rows[name] = (float(pair[0]), int(pair[1]))
    label = label or Path(result["model"]).name or result["model"]
    plain = not condition.get("blank_image") and not condition.get("detach")
    heading = label if plain else f"{label} ({condition['title']})"
    return Run(heading, folder, result["benchmark"], rows, _read_items(folder / ITEMS), result)


def _read_items(file: Path) -> dict[str, Item]:
    if not file.is_file():
        return {}
    items: dict[str, Item] = {}
    metrics: set[str] | None = None
    for number, row in enumerate(read_jsonl(file, required=("item", "values", "groups")), start=1):
        values, groups = row["values"], row["groups"]
        whole = isinstance(values, dict) and values and all(_is_number(value) for value in values.values())
        if not whole or set(values) != (metrics or set(values)):
            raise DataError(f"{file}, line {number}: 'values' must be the same metrics in every line, each a number")
        metrics = set(values)
        if not isinstance(groups, dict) or not all(isinstance(names, list) for names in groups.values()):
            raise DataError(f"{file}, line {number}: 'groups' must name lists of groups")
        name = str(row["item"])
        if name in items:
            raise DataError(f"{file}, line {number}: {name!r} occurs twice")
        texts = {key: _text(row.get(key)) for key in ("prompt", "image", "answer", "expected")}
        groups = {str(level): [str(group) for group in names] for level, names in groups.items()}
        items[name] = Item(name, {key: float(value) for key, value in values.items()}, groups, **texts)
    return items


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
