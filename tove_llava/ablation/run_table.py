"""Tables of runs: for the terminal, as Markdown, CSV and JSON."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tove_llava.ablation.differences import Group, differing_keys, short_paths, shown
from tove_llava.ablation.seed_means import SeedMean
from tove_llava.ablation.training_runs import LOSSES, TrainingRun
from tove_llava.core.text import aligned, markdown_table

_FEW = 3  # rows of a benchmark without an overall score that a table shows
Read = Callable[[TrainingRun], float | None]


@dataclass(frozen=True)
class RunTable:
    """Runs of one stage as a table: a line for each group.

    Attributes:
        std: show the standard deviation over seeds instead of the 95 % interval.
    """

    groups: Sequence[Group]
    std: bool = True
    runs: list[TrainingRun] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", [run for group in self.groups for run in group.runs])

    @property
    def keys(self) -> list[str]:
        return differing_keys(self.runs)

    @property
    def numbers(self) -> dict[str, tuple[Read, str]]:
        """Map a column of numbers to the function that reads it, and its format."""
        found: dict[str, tuple[Read, str]] = {}
        for key in LOSSES:
            if any(key in run.losses for run in self.runs):
                found[key] = partial(_loss, key), ".4f"
        for name in dict.fromkeys(name for run in self.runs for name in run.gate):
            found[f"gate {name}"] = partial(_gate, name), ".3f"
        return found | self.scores

    @property
    def scores(self) -> dict[str, tuple[Read, str]]:
        """Return the columns of scores, as in :attr:`numbers`."""
        found: dict[str, tuple[Read, str]] = {}
        for benchmark, rows in self.score_rows.items():
            for row in _headlines(rows):
                title = benchmark if row == "overall" else f"{benchmark} {row}"
                found[title] = partial(_score, benchmark, row), ".1f"
        return found

    @property
    def score_rows(self) -> dict[str, list[str]]:
        """Map each benchmark to the rows of its score."""
        found: dict[str, dict[str, None]] = {}
        for run in self.runs:
            for benchmark, rows in run.scores.items():
                found.setdefault(benchmark, {}).update(dict.fromkeys(rows))
        return {benchmark: list(rows) for benchmark, rows in found.items()}

    def cells(self) -> list[list[str]]:
        """Return the heading and a line for each group."""
        settings = [short_paths([shown(group.runs[0].settings, key) for group in self.groups]) for key in self.keys]
        counted = any(len(group.runs) > 1 for group in self.groups)
        seeds = len({run.seed for run in self.runs}) > 1
        header = ["run", *self.keys, *(["seeds"] if counted else ["seed"] * seeds), "state", *self.numbers]
        lines = [header]
        for index, group in enumerate(self.groups):
            which = [str(len(group.runs))] if counted else [str(group.runs[0].seed)] * seeds
            numbers = [self._number(group, read, form) for read, form in self.numbers.values()]
            lines.append([group.label, *(column[index] for column in settings), *which, _state(group), *numbers])
        return lines

    def _number(self, group: Group, read: Read, form: str) -> str:
        values = group.values(read)
        return SeedMean.of(values, interval=not self.std).text(form, std=self.std) if values else "-"

    @property
    def _left(self) -> int:
        return 1 + len(self.keys)

    def text(self) -> str:
        return aligned(self.cells(), left=self._left)

    def markdown(self) -> str:
        header, *lines = self.cells()
        return markdown_table(header, lines, left=self._left)

    def csv_rows(self) -> list[dict[str, Any]]:
        """Return a row for each run, with every row of its scores."""
        rows = []
        for group in self.groups:
            for run in group.runs:
                settings = {key: shown(run.settings, key) for key in self.keys}
                scores = {f"{name}: {row}": pair[0] for name, rows in run.scores.items() for row, pair in rows.items()}
                gate = {f"gate {name}": value for name, value in run.gate.items()}
                rows.append({**_identity(group, run), **settings, **run.losses, **gate, **scores})
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return the groups with their means, and each run within."""
        groups = []
        for group in self.groups:
            means = {}
            for name, (read, _) in {**self.numbers, **self._all_scores()}.items():
                if values := group.values(read):
                    found = SeedMean.of(values, interval=not self.std)
                    means[name] = {"mean": found.mean, "std": _finite(found.std), "count": found.count}
                    if not self.std:
                        means[name]["half_width_95"] = _finite(found.half)
            settings = {key: group.runs[0].settings.get(key) for key in self.keys}
            runs = [
                {**_identity(group, run), "losses": run.losses, "gate": run.gate, "scores": run.scores}
                for run in group.runs
            ]
            groups.append({"label": group.label, "settings": settings, "means": means, "runs": runs})
        return {"stage": self.runs[0].stage, "groups": groups}

    def _all_scores(self) -> dict[str, tuple[Read, str]]:
        pairs = [(name, row) for name, rows in self.score_rows.items() for row in rows]
        return {f"{name}: {row}": (partial(_score, name, row), ".1f") for name, row in pairs}


def tables(groups: Sequence[Group], std: bool = True) -> list[RunTable]:
    """Make a table for each stage."""
    stages = dict.fromkeys(group.stage for group in groups)
    return [RunTable([group for group in groups if group.stage == stage], std) for stage in stages]


def csv_text(found: Sequence[RunTable]) -> str:
    """Write the runs of all tables as one CSV file."""
    rows = [row for table in found for row in table.csv_rows()]
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _identity(group: Group, run: TrainingRun) -> dict[str, Any]:
    return {
        "group": group.label,
        "folder": str(run.folder),
        "stage": run.stage,
        "seed": run.seed,
        "state": run.state,
        "step": run.step,
        "steps": run.steps,
    }


def _state(group: Group) -> str:
    states = Counter(run.state_text if len(group.runs) == 1 else run.state for run in group.runs)
    if len(states) == 1:
        return next(iter(states))
    return ", ".join(f"{count} {state}" for state, count in states.items())


def _headlines(rows: Sequence[str]) -> list[str]:
    return ["overall"] if "overall" in rows else list(rows[:_FEW])


def _finite(value: float) -> float | None:
    return None if value != value else value


def _loss(key: str, run: TrainingRun) -> float | None:
    return run.losses.get(key)


def _gate(name: str, run: TrainingRun) -> float | None:
    return run.gate.get(name)


def _score(benchmark: str, row: str, run: TrainingRun) -> float | None:
    scores: Mapping[str, tuple[float, int]] = run.scores.get(benchmark, {})
    return scores[row][0] if row in scores else None
