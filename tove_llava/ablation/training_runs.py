"""Read the folders that ``tove-llava train`` writes: settings, state, losses and scores."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tove_llava.checkpoints.manifest import MANIFEST
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.files import read_json_object
from tove_llava.core.locks import LOCK, is_locked
from tove_llava.eval.report.runs import read_run
from tove_llava.eval.result_files import RESULT
from tove_llava.train.run_files import CHECKPOINT, RUN_RECORD, STAGING, STATE, complete

SEED = "arguments.seed"
EXPERTS = "vision.experts"
FINISHED, RUNNING, INTERRUPTED = "finished", "running", "interrupted"
LOSSES = ("lm_loss", "aux_loss", "merge_loss", "train_loss")
_DEPTH = 6  # of folders that are searched for runs
_GIVE = "give folders that 'tove-llava train' wrote, or a folder with such"

Scores = Mapping[str, Mapping[str, tuple[float, int]]]  # benchmark -> row -> value and questions


@dataclass(frozen=True)
class TrainingRun:
    """A run of one training stage.

    Attributes:
        label: its name in tables.
        settings: ``run.json``, flat; keys of the stages before begin with their name, as in "pretrain: vision.fusion".
        has_start: all stages before are known.
        state: :data:`FINISHED`, :data:`RUNNING` or :data:`INTERRUPTED`.
        step: last step on disk; None before the first checkpoint.
        history: the Trainer's logs until that step.
        scores: of evaluations of these very weights.
    """

    folder: Path
    label: str
    stage: str
    settings: Mapping[str, Any]
    has_start: bool
    state: str
    step: int | None
    steps: int | None
    history: Sequence[Mapping[str, float]]
    scores: Scores

    @property
    def seed(self) -> Any:
        return self.settings.get(SEED)

    def last(self, key: str) -> float | None:
        """Return the last logged value of a quantity."""
        return next((entry[key] for entry in reversed(self.history) if key in entry), None)

    @property
    def losses(self) -> dict[str, float]:
        """Return the last logged losses, or the run's mean where no step was logged."""
        found = {key: value for key in LOSSES if (value := self.last(key)) is not None}
        if "lm_loss" in found:
            found.pop("train_loss", None)
        return found

    @property
    def gate(self) -> dict[str, float]:
        """Return the last logged mean weight of each expert, and the entropy."""
        keys = dict.fromkeys(key for entry in self.history for key in entry if key.startswith("gate/"))
        return {key.removeprefix("gate/"): value for key in keys if (value := self.last(key)) is not None}

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a logged quantity."""
        entries = [(int(entry["step"]), entry[key]) for entry in self.history if key in entry and "step" in entry]
        return [step for step, _ in entries], [value for _, value in entries]

    @property
    def state_text(self) -> str:
        done = "" if self.step is None or self.state == FINISHED else f" at step {self.step} of {self.steps}"
        return self.state + done


def find_runs(folders: Sequence[str | Path]) -> list[TrainingRun]:
    """Read the runs in these folders and below them, in order.

    Raises:
        ConfigError: a folder holds no run.
        DataError: a run's file is damaged, or is another program's.
    """
    found: dict[Path, TrainingRun] = {}
    for given in folders:
        top = Path(given)
        if not top.is_dir():
            raise ConfigError(f"there is no folder {top}; {_GIVE}")
        if (top / RUN_RECORD).is_file() and "benchmark" in read_json_object(top / RUN_RECORD, DataError):
            raise ConfigError(f"{top / RUN_RECORD} has the key 'benchmark', so it is an evaluation's; {_GIVE}")
        below = list(_folders_of_runs(top))
        if not below:
            raise ConfigError(f"{top} is no training run, and has none below it: there is no {RUN_RECORD}; {_GIVE}")
        for folder in below:
            found.setdefault(folder.resolve(), read_training_run(folder))
    return list(found.values())


def _folders_of_runs(top: Path) -> Iterator[Path]:
    for name, folders, files in os.walk(top):
        folder = Path(name)
        if RUN_RECORD in files and "benchmark" not in read_json_object(folder / RUN_RECORD, DataError):
            yield folder
        deep = len(folder.relative_to(top).parts) >= _DEPTH
        hidden = (".", CHECKPOINT, STAGING)
        folders[:] = [] if deep else sorted(entry for entry in folders if not entry.startswith(hidden))


def read_training_run(folder: Path, label: str = "", evaluation: Path | None = None) -> TrainingRun:
    """Read one run.

    Args:
        evaluation: folder of its results; by default they are looked for in and next to the run.

    Raises:
        DataError: its record is damaged, or is another program's.
    """
    settings, has_start = _settings(folder, ())
    finished = (folder / MANIFEST).is_file()
    checkpoints = complete(folder)
    state: dict[str, Any] = {}
    for place in (folder, *checkpoints[-1:]):
        if (place / STATE).is_file():
            state = read_json_object(place / STATE, DataError)
            break
    condition = FINISHED if finished else INTERRUPTED
    if not finished and is_locked(folder / LOCK):
        condition = RUNNING
    return TrainingRun(
        folder=folder,
        label=label or os.fspath(folder),
        stage=settings["stage"],
        settings=settings,
        has_start=has_start,
        state=condition,
        step=state.get("global_step"),
        steps=state.get("max_steps"),
        history=state.get("log_history", []),
        scores=_scores(folder, evaluation) if finished else {},
    )


def _settings(folder: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], bool]:
    """Read the records of a run and its earlier stages; say if all are there."""
    file = folder / RUN_RECORD
    record = read_json_object(file, DataError, _GIVE)
    for key in ("stage", "preset"):
        if not isinstance(record.get(key), str):
            raise DataError(f"{file} has no {key!r}; was it written by 'tove-llava train'?")
    settings = _with_experts_by_name({key: _plain(value) for key, value in record.items() if value is not None})
    if isinstance(settings.get("plugins"), dict):  # short enough for a table
        named = (f"{name} {str(version)[:8]}" for name, version in sorted(settings["plugins"].items()))
        settings["plugins"] = ", ".join(named)
    before = settings.get("pretrained")
    if before is None:
        return settings, True
    start = Path(before)
    if start in seen or not (start / RUN_RECORD).is_file():
        return settings, False
    earlier, whole = _settings(start, (*seen, folder))
    stage = earlier.pop("stage")
    for key, value in earlier.items():
        if key != "pretrained":
            settings[key if ": " in key else f"{stage}: {key}"] = value
    return settings, whole


def _plain(value: Any) -> Any:
    """Return 1.0 as 1: a flag's value and a preset's are then the same."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _with_experts_by_name(settings: dict[str, Any]) -> dict[str, Any]:
    experts = settings.get(EXPERTS)
    if isinstance(experts, list) and all(isinstance(expert, dict) and "name" in expert for expert in experts):
        settings[EXPERTS] = [expert["name"] for expert in experts]
        for expert in experts:
            settings |= {f"{EXPERTS}.{expert['name']}.{key}": v for key, v in expert.items() if key != "name"}
    return settings


def _scores(folder: Path, evaluation: Path | None) -> dict[str, dict[str, tuple[float, int]]]:
    """Read the results of these weights; the newest of several."""
    fingerprint = read_json_object(folder / MANIFEST, DataError).get("fingerprint")
    if evaluation is not None:
        files = set(evaluation.glob(f"*/*/{RESULT}"))
    else:
        patterns = (f"*/*/{RESULT}", f"*/*/*/{RESULT}")
        tops = (folder, folder.parent)
        files = {file.resolve() for top in tops for pattern in patterns for file in top.glob(pattern)}
    scores = {}
    for file in sorted(files, key=lambda file: (file.stat().st_mtime, file)):
        if read_json_object(file, DataError).get("fingerprint") != fingerprint:
            continue
        run = read_run(file.parent)
        condition = run.result["condition"]["name"]
        scores[run.benchmark if condition == "full" else f"{run.benchmark} ({condition})"] = dict(run.rows)
    return dict(sorted(scores.items()))
