"""The detach curve: experts are removed singly, down to plain CLIP."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tove_llava.analysis.contributions import loss_and_accuracy
from tove_llava.analysis.measure import measure, tower_with_experts
from tove_llava.analysis.plots import plot_curve
from tove_llava.analysis.results import Step, write_record
from tove_llava.analysis.samples import COUNTED, Samples
from tove_llava.analysis.speed import seconds
from tove_llava.core.text import aligned, number, percent
from tove_llava.eval.provenance import provenance
from tove_llava.inference.generation import Answerer

ROUNDS = 7


def detach_curve(answerer: Answerer, samples: Samples, ranking: Sequence[str], batch_size: int = 16) -> list[Step]:
    """Measure the model while experts are removed in the order of ``ranking``.

    The ranking is not computed again at each step, so a checkpoint made with ``--keep N`` is a point of the curve.

    Raises:
        ConfigError: the model has no experts, or not these.
        DataError: an image cannot be read.
    """
    tower = tower_with_experts(answerer)
    subsets = [tuple(ranking[:count]) for count in range(len(ranking) + 1)]
    found = measure(answerer, samples.rows, subsets, batch_size=batch_size, label="curve")
    times = seconds(tower, subsets, batch=batch_size, rounds=ROUNDS)
    steps = []
    for subset, taken in zip(subsets, times, strict=True):
        loss, accuracy = loss_and_accuracy(found, subset, range(len(samples.rows)))
        left = tuple(name for name in tower.config.attached_experts if name not in subset)
        steps.append(Step(subset[-1] if subset else None, left, loss, accuracy, batch_size / taken))
    return steps


def curve_table(steps: Sequence[Step]) -> str:
    """Format the curve as a table."""
    lines = [["experts left", "removed", "loss", "accuracy (%)", "tower images/s"]]
    for step in steps:
        names = ", ".join(step.experts) or "none (plain CLIP)"
        speed = number(step.images_per_second, ".1f")
        lines.append([names, step.removed or "-", number(step.loss, ".4f"), percent(step.accuracy, ".1f"), speed])
    return aligned(lines)


def save_curve(
    steps: Sequence[Step],
    folder: str | Path,
    answerer: Answerer,
    model: str | Path,
    samples: Samples,
    data: str | Path,
    batch_size: int,
) -> dict[str, Any]:
    """Write ``detach_curve.json`` and its plot; return the record in the file."""
    record = {
        "kind": "detach_curve",
        **provenance(answerer, model),
        **samples.origin(data),
        "records": len(samples.rows),
        "counted_answers": COUNTED,
        "batch_size": batch_size,
        "timed_batches": ROUNDS,
        "steps": [dataclasses.asdict(step) for step in steps],
    }
    write_record(Path(folder) / "detach_curve.json", record)
    plot_curve(steps, Path(folder) / "detach_curve.png")
    return record
