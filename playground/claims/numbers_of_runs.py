"""The runs' results, with means and confidence intervals over seeds."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jobs import Settings
from records import DONE

from tove_llava.core.text import markdown_table
from tove_llava.eval.benchmarks.playground_scenes import normalise
from tove_llava.scenes.language import CATEGORIES

BOTH = "spatial and depth"
SPATIAL_AND_DEPTH = ("left_right", "above_below", "statement", "front_behind", "nearer")
ROWS = (*CATEGORIES, BOTH, "overall")

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom; beyond, the normal distribution's.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and its 95 % half-width (Student's t)."""

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        count = len(values)
        if count < 2:
            return cls(statistics.mean(values), math.nan, count)
        t = _T[count - 2] if count - 2 < len(_T) else 1.96
        return cls(statistics.mean(values), t * statistics.stdev(values) / math.sqrt(count), count)

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:.1f}{self._half}"

    @property
    def signed(self) -> str:
        return f"{self.mean:+.1f}{self._half}"

    @property
    def _half(self) -> str:
        """Format the half-width; one seed has none."""
        return "" if math.isnan(self.half) else f" ± {self.half:.1f}"


@dataclass(frozen=True)
class Runs:
    """All seeds of one arm."""

    settings: Settings
    name: str

    def seeds(self) -> list[int]:
        """List the seeds whose run is finished."""
        root = self.settings.out / "runs" / self.name
        return [seed for seed in range(self.settings.seeds) if (root / str(seed) / DONE).is_file()]

    def folder(self, seed: int) -> Path:
        return self.settings.out / "runs" / self.name / str(seed)

    def accuracy(self, row: str) -> list[float]:
        """Return percent right by seed: of a type, some types, or overall."""
        return [self._scores(seed)[row] for seed in self.seeds()]

    def interval(self, row: str) -> Interval:
        return Interval.of(self.accuracy(row))

    def gain(self, over: "Runs", row: str) -> Interval:
        """Return the difference to another arm, paired by seed."""
        return Interval.of([a - b for a, b in zip(self.accuracy(row), over.accuracy(row), strict=True)])

    def seconds(self) -> float:
        """Return the median duration of a run."""
        return statistics.median(json.loads((self.folder(s) / DONE).read_text())["seconds"] for s in self.seeds())

    def right(self, seed: int) -> dict[str, bool]:
        """Map each question id to whether it was answered right."""
        truth = _truth(self.settings.scenes)
        rows = [json.loads(line) for line in self._file(seed, "answers.jsonl").read_text().splitlines()]
        return {row["question_id"]: normalise(row["text"]) == truth[row["question_id"]] for row in rows}

    def logged(self, key: str, stage: str = "model") -> list[float]:
        """Return the last logged value of a training quantity, by seed."""
        values = []
        for seed in self.seeds():
            log = json.loads((self.folder(seed) / stage / "trainer_state.json").read_text())["log_history"]
            values.append([entry[key] for entry in log if key in entry][-1])
        return values

    def overall(self, seed: int) -> float:
        """Return the percent right of one seed."""
        return self._scores(seed)["overall"]

    def _file(self, seed: int, name: str) -> Path:
        return self.folder(seed) / "eval" / "scenes" / "full" / name

    def _scores(self, seed: int) -> dict[str, float]:
        file = self.folder(seed) / "eval" / "results.json"
        found = json.loads(file.read_text())["benchmarks"]["scenes"]["full"]["scores"]
        percent = {name: 100 * entry["accuracy"] for name, entry in found.items()}
        return {**percent, BOTH: statistics.mean(percent[name] for name in SPATIAL_AND_DEPTH)}


def summary(settings: Settings) -> list[dict[str, Any]]:
    """List each finished run: name, seed, accuracy, seconds, processor seconds."""
    rows = []
    for file in (settings.out / "runs").glob(f"*/*/{DONE}"):
        record, name, seed = json.loads(file.read_text()), file.parts[-3], int(file.parts[-2])
        kept = {key: record.get(key) for key in ("seconds", "cpu_seconds", "resumed", "date", "commit", "machine")}
        rows.append({"name": name, "seed": seed, "accuracy": Runs(settings, name).overall(seed), **kept})
    return sorted(rows, key=lambda row: (row["name"], row["seed"]))


@cache
def _truth(scenes: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (scenes / "val_questions.jsonl").read_text().splitlines()]
    return {row["question_id"]: normalise(str(row["answer"])) for row in rows}


def by_type(arms: Sequence[Runs]) -> str:
    """Format a table: question types down, arms across."""
    rows = [[row, *(str(arm.interval(row)) for arm in arms)] for row in ROWS]
    return markdown_table(["accuracy, %", *(arm.name for arm in arms)], rows)
