"""Measurements on finished runs: the towers' speed, and the detach curves."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from jobs import Job, Settings, command
from records import is_done, recorded, weights

MEASURES: dict[str, Callable[[Settings], None]] = {}
BATCH, ROUNDS = 32, 31
CURVE_QUESTIONS = 800  # held-out ones, on which each step is scored
RANKING_RECORDS = 300  # training scenes on which the experts are ranked; the scored ones must not choose


def measure(name: str) -> Callable[[Callable[[Settings], None]], Callable[[Settings], None]]:
    def add(function: Callable[[Settings], None]) -> Callable[[Settings], None]:
        MEASURES[name] = function
        return function

    return add


@measure("c")
def speed(settings: Settings) -> None:
    """Time CLIP, ToVE-lite and ToVE in turn; write ``speed.json``."""
    import tove_llava

    jobs = {"clip": Job("clip", 0), "lite": Job("tove", 0, label="lite", merge="-"), "tove": Job("tove", 0)}
    models = {name: settings.folder(job) / "model" for name, job in jobs.items()}
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
    found["weights"] = {name: weights(model) for name, model in models.items()}
    (settings.out / "speed.json").write_text(json.dumps(found, indent=1) + "\n")


def _gflop(tower: Any, pixels: torch.Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(pixels)
    return counter.get_total_flops() / 1e9


@measure("d")
def curves(settings: Settings) -> None:
    """Rank every ToVE's experts; write ``curves/SEED/detach_curve.json`` by ``tove-llava detach``.

    Raises:
        StaleRecord: a folder holds the curve of another model.
    """
    for seed in range(settings.seeds):
        model, out = settings.folder(Job("tove", seed)) / "model", settings.out / "curves" / str(seed)
        made = curve_of(settings, seed)
        if is_done(out, made):
            continue
        with recorded(out, made, settings.commit):
            common = ("--model", model, "--image-folder", settings.scenes / "images", "--out", out)
            ranking = settings.scenes / "train_instruct.json"
            command("contributions", *common, "--data", ranking, "--limit", RANKING_RECORDS)
            command(
                "detach", "--curve", *common, "--data", settings.scenes / "val_questions.jsonl",
                "--limit", CURVE_QUESTIONS, "--contributions", out / "contributions.json",
            )  # fmt: skip


def curve_of(settings: Settings, seed: int) -> dict[str, Any]:
    """List what a curve depends on."""
    scenes = {"train": settings.train, "val": settings.val, "seed": settings.scene_seed}
    model = weights(settings.folder(Job("tove", seed)) / "model")
    return {"weights": model, "scenes": scenes, "questions": CURVE_QUESTIONS, "ranking_records": RANKING_RECORDS}
