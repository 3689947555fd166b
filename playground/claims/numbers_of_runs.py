"""The numbers of the claims' runs, from the results that ``tove-llava ablate`` wrote."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tove_llava.ablation.grid_results import RESULTS
from tove_llava.ablation.seed_means import SeedMean
from tove_llava.core.text import markdown_table
from tove_llava.eval.rules.exact_match import normalise
from tove_llava.scenes.language import CATEGORIES

ROOT = Path(__file__).resolve().parents[2]
BOTH = "spatial and depth"
SPATIAL_AND_DEPTH = ("left_right", "above_below", "statement", "front_behind", "nearer")
ROWS = (*CATEGORIES, BOTH, "overall")


@dataclass(frozen=True)
class Study:
    """A folder of runs, and the sizes that they share."""

    out: Path
    seeds: int
    train: int
    val: int
    scene_seed: int
    further: int = 8000

    @property
    def scenes(self) -> Path:
        return self.out / "scenes"

    @property
    def pictures(self) -> Path:
        """Return the folder of further scenes, only for their images."""
        return self.out / "pictures"

    @property
    def features(self) -> Path:
        return self.out / "features"

    @cached_property
    def runs(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Map each arm and seed to its evaluated run."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        file = self.out / RESULTS
        for table in json.loads(file.read_text()) if file.is_file() else ():
            for group in table["groups"]:
                runs = {run["seed"]: run for run in group["runs"] if run["scores"] and run["seed"] < self.seeds}
                found[group["label"]] = dict(sorted(runs.items()))
        return found

    @cached_property
    def truth(self) -> dict[str, str]:
        rows = [json.loads(line) for line in (self.scenes / "val_questions.jsonl").read_text().splitlines()]
        return {row["question_id"]: normalise(str(row["answer"])) for row in rows}


@dataclass(frozen=True)
class Runs:
    """All seeds of one arm."""

    study: Study
    name: str

    @property
    def by_seed(self) -> dict[int, dict[str, Any]]:
        return self.study.runs.get(self.name, {})

    def model(self, seed: int) -> Path:
        return Path(self.by_seed[seed]["folder"])

    def accuracy(self, row: str) -> list[float]:
        """Return percent right by seed: of a type, some types, or overall."""
        found = []
        for run in self.by_seed.values():
            percent = {name: pair[0] for name, pair in run["scores"]["scenes"].items()}
            whole = {**percent, BOTH: statistics.mean(percent[name] for name in SPATIAL_AND_DEPTH)}
            found.append(whole[row])
        return found

    def interval(self, row: str) -> SeedMean:
        return SeedMean.of(self.accuracy(row))

    def gain(self, over: "Runs", row: str) -> SeedMean:
        """Return the difference to another arm, paired by seed."""
        return SeedMean.of([a - b for a, b in zip(self.accuracy(row), over.accuracy(row), strict=True)])

    def seconds(self) -> float:
        """Return the median duration of a run."""
        return statistics.median(sum(job["seconds"] for job in run["jobs"].values()) for run in self.by_seed.values())

    def right(self, seed: int) -> dict[str, bool]:
        """Map each question id to whether it was answered right."""
        file = Path(self.by_seed[seed]["evaluation"]) / "scenes" / "full" / "answers.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return {row["question_id"]: normalise(row["text"]) == self.study.truth[row["question_id"]] for row in rows}

    def gate(self, name: str) -> list[float]:
        """Return the last logged value of a quantity of the gate, by seed."""
        return [run["gate"][name] for run in self.by_seed.values()]

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Return the records of all seeds' jobs, by name."""
        return {name: job for run in self.by_seed.values() for name, job in run["jobs"].items()}


@dataclass(frozen=True)
class Cost:
    """The cost of some jobs, from their records."""

    jobs: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, jobs: Iterable[dict[str, dict[str, Any]]]) -> "Cost":
        """Join jobs by name: what arms share counts once."""
        return cls(tuple({name: job for some in jobs for name, job in some.items()}.values()))

    @property
    def cpu_seconds(self) -> float:
        return sum(job["cpu_seconds"] for job in self.jobs)

    def distinct(self, key: str) -> list[str]:
        return sorted({job[key] for job in self.jobs})

    @property
    def resumed(self) -> int:
        return sum(job["tries"] > 1 for job in self.jobs)


def by_type(arms: Sequence[Runs]) -> str:
    """Format a table: question types down, arms across."""
    rows = [[row, *(str(arm.interval(row)) for arm in arms)] for row in ROWS]
    return markdown_table(["accuracy, %", *(arm.name for arm in arms)], rows)
