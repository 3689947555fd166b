"""Measurements on finished models: the towers' speed, and the detach curves."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from numbers_of_runs import Runs, Study

from tove_llava.ablation.grid import Grid, Job
from tove_llava.ablation.job_pool import JobPool
from tove_llava.ablation.job_records import JobRecord
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.cli import main
from tove_llava.core.errors import ConfigError

MEASURES: dict[str, Callable[[Study], None]] = {}
BATCH, ROUNDS = 32, 31
CURVE_QUESTIONS = 800  # held-out ones, on which each step is scored
RANKING_RECORDS = 300  # training scenes on which the experts are ranked; the scored ones must not choose


def measure(function: Callable[[Study], None]) -> Callable[[Study], None]:
    MEASURES[function.__name__] = function
    return function


@measure
def speed(study: Study) -> None:
    """Time CLIP, ToVE-lite and ToVE in turn; write ``speed.json``."""
    import tove_llava

    models = {name: Runs(study, name).model(0) for name in ("clip", "lite", "tove")}
    towers = {name: tove_llava.load_model(model)[0].tower for name, model in models.items()}
    pixels = torch.randn(BATCH, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in towers}
    with torch.inference_mode():
        for round_ in range(ROUNDS + 2):
            names = list(towers) if round_ % 2 else list(towers)[::-1]
            for name in names:
                started = time.perf_counter()
                towers[name](pixels)
                if round_ > 1:  # the first two warm up
                    times[name].append(1000 * (time.perf_counter() - started) / BATCH)
    rows = []
    for name, tower in towers.items():
        # Paired: each round's time over the same round's time of CLIP.
        ratio = statistics.median(a / b for a, b in zip(times[name], times["clip"], strict=True))
        kind = type(tower.frozen.clip).__name__ + (" and experts" if tower.active_experts else "")
        rows.append(
            [name, kind, f"{_gflop(tower, pixels[:1]):.3f}", f"{statistics.median(times[name]):.2f}", f"{ratio:.2f}"]
        )
    found = {"batch": BATCH, "rounds": ROUNDS, "threads": torch.get_num_threads(), "rows": rows}
    found["weights"] = {name: Manifest.read(model).fingerprint for name, model in models.items()}
    (study.out / "speed.json").write_text(json.dumps(found, indent=1) + "\n")


def _gflop(tower: Any, pixels: torch.Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(pixels)
    return counter.get_total_flops() / 1e9


@measure
def curves(study: Study) -> None:
    """Rank every ToVE's experts, and score it with fewer and fewer of them."""
    grid = curve_grid(study)
    pool = JobPool(grid, 1, main)
    pool.run()
    if pool.failures:
        raise ConfigError("; ".join(f"{grid.jobs[key].title}: {why}" for key, why in pool.failures.items()))


def curve_grid(study: Study) -> Grid:
    """Return two jobs for each seed; both write into ``curves/SEED-WEIGHTS``."""
    grid = Grid(study.out)
    for seed in Runs(study, "tove").by_seed:
        model = Runs(study, "tove").model(seed)
        out = study.out / "curves" / f"{seed}-{Manifest.read(model).fingerprint[:10]}"
        common = ["--model", model, "--image-folder", study.scenes / "images", "--out", out]
        ranking = ["--data", study.scenes / "train_instruct.json", "--limit", RANKING_RECORDS]
        questions = ["--data", study.scenes / "val_questions.jsonl", "--limit", CURVE_QUESTIONS]
        first = ["contributions", *common, *ranking]
        second = ["detach", "--curve", *common, *questions, "--contributions", out / "contributions.json"]
        needs: tuple[str, ...] = ()
        for words in (first, second):
            name = f"{words[0]}-{out.name}"
            grid.add(Job(name, name, f"seed {seed}: {words[0]}", tuple(map(str, words)), out, needs))
            needs = (name,)
    grid.wanted.update(grid.jobs)
    return grid


def curve_jobs(study: Study) -> dict[str, dict[str, Any]]:
    """Return the records of the curves' jobs, by name."""
    found = {job.name: JobRecord(study.out, job).read() for job in curve_grid(study).jobs.values()}
    return {name: record for name, record in found.items() if record}
