"""Find the settings in which runs differ; group the seeds of one setting."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tove_llava.ablation.training_runs import EXPERTS, SEED, TrainingRun

_DERIVED = ("pretrained_fingerprint", "data_bytes")  # they follow from other keys
_ABSENT = "-"


@dataclass(frozen=True)
class Group:
    """The seeds of one setting; without grouping a single run."""

    label: str
    runs: Sequence[TrainingRun]

    @property
    def stage(self) -> str:
        return self.runs[0].stage

    def values(self, read: Any) -> list[float]:
        """Return what ``read`` finds in each run, without None."""
        return [value for run in self.runs if (value := read(run)) is not None]


def group_seeds(runs: Sequence[TrainingRun], by_seed: bool = False) -> list[Group]:
    """Put runs together that differ only in their seed; a second run of a seed begins another group."""
    if by_seed:
        return [Group(run.label, [run]) for run in runs]
    groups: dict[tuple[str, int], list[TrainingRun]] = {}
    seen: Counter[tuple[str, Any]] = Counter()
    for run in runs:
        known = {key: value for key, value in run.settings.items() if not _is_left_out(key, run.has_start)}
        same = json.dumps([run.has_start, known], sort_keys=True)
        groups.setdefault((same, seen[same, run.seed]), []).append(run)
        seen[same, run.seed] += 1
    return [Group(_shared_label([run.label for run in group]), group) for group in groups.values()]


def _is_left_out(key: str, has_start: bool) -> bool:
    """Return True for seeds, and for what is known from another key."""
    own = key.rpartition(": ")[2]
    return own == SEED or own in _DERIVED or (key == "pretrained" and has_start)


def _shared_label(labels: Sequence[str]) -> str:
    """Write ``*`` from where the names of folders differ."""
    if len(labels) == 1 or len(set(labels)) == 1:
        return labels[0]
    parts = [Path(label).parts for label in labels]
    if len({len(names) for names in parts}) > 1:
        return f"{labels[0]}, ..."
    shared = [(set(names), os.path.commonprefix(names)) for names in zip(*parts, strict=True)]
    return str(Path(*(start if len(names) == 1 else f"{start}*" for names, start in shared)))


def differing_keys(runs: Sequence[TrainingRun]) -> list[str]:
    """List the keys of settings that differ, without seeds and derived keys.

    A key of an earlier stage is left out where it differs as the run's own does.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    has_start = all(run.has_start for run in runs)
    columns: dict[str, list[str]] = {}
    for key in keys:
        if _is_left_out(key, has_start):
            continue
        column = [shown(run.settings, key) for run in runs]
        there = [cell for cell in column if cell != _ABSENT] if _is_of_an_expert(key) else column
        if len(set(there)) > 1:
            columns[key] = column
    return [key for key, column in columns.items() if ": " not in key or column not in _others(columns, key)]


def _others(columns: Mapping[str, Any], key: str) -> list[Any]:
    own = key.rpartition(": ")[2]
    return [column for other, column in columns.items() if other == own]


def _is_of_an_expert(key: str) -> bool:
    return f"{EXPERTS}." in key


def shown(settings: Mapping[str, Any], key: str) -> str:
    """Format a setting for a table."""
    value = settings.get(key)
    if value is None:
        return _ABSENT
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return ",".join(value) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def short_paths(cells: Sequence[str]) -> list[str]:
    """Shorten paths of one column to their ends, where these still differ."""
    if not all(cell.startswith("/") or cell == _ABSENT for cell in cells):
        return list(cells)
    for length in range(1, 1 + max(len(Path(cell).parts) for cell in cells)):
        short = {cell: "/".join(Path(cell).parts[-length:]) for cell in cells}
        if len(set(short.values())) == len(short):
            return [short[cell] for cell in cells]
    return list(cells)
