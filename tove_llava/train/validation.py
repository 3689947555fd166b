"""Measure the loss on held-out records while a run trains, and keep the best model."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from tove_llava.core.errors import NonFiniteError
from tove_llava.core.files import writing
from tove_llava.data import IGNORE_INDEX

BEST = "best"  # folder of the best model in a run's folder


class Validation:
    """Held-out records, and what is done when their loss is the lowest so far.

    Args:
        dataset: examples with their record's index.
        collate: makes a batch of them.
        keep: writes the model to a folder, given its trained tensors; None keeps no best model.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], Any],
        keep: Callable[[Path, dict[str, torch.Tensor]], None] | None,
    ) -> None:
        self.dataset, self.collate, self.keep = dataset, collate, keep

    def batches(self, batch_size: int, workers: int) -> Iterator[tuple[Any, bool]]:
        """Yield this rank's batches, equally many on every rank, and whether each counts.

        A rank without records left gets the first one again, which does not count: under ZeRO-3 all ranks run the model
        equally often.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        count = len(self.dataset)  # type: ignore[arg-type]
        step = world * batch_size
        starts = range(rank * batch_size, math.ceil(count / step) * step, step)
        portions = [list(range(start, min(start + batch_size, count))) for start in starts]
        loader = DataLoader(
            self.dataset,
            batch_sampler=[portion or [0] for portion in portions],
            collate_fn=self.collate,
            num_workers=workers,
            generator=torch.Generator(),  # without one it would draw from the generator that training draws from
        )
        for portion, batch in zip(portions, loader, strict=True):
            yield batch, bool(portion)


@torch.no_grad()
def mean_loss(
    batches: Iterator[tuple[Any, bool]], summed: Callable[[Any], tuple[torch.Tensor, int]], device: torch.device
) -> float:
    """Return the mean cross-entropy over all supervised tokens of the held-out records. Every rank calls this.

    Args:
        batches: from :meth:`Validation.batches`.
        summed: returns a batch's sum of cross-entropies on this rank, and the supervised tokens of all ranks.
    """
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch, counts in batches:
        if not counts:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
            batch["supervised"] = batch["supervised"][:0]
        loss, count = summed(batch)
        total += loss.double()
        tokens += count
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    mean = total.item() / max(tokens, 1)
    if not math.isfinite(mean):
        raise NonFiniteError(f"the loss on the held-out records is {mean}; look at them, or lower the learning rate")
    return mean


def keep_best(run: Path, write: Callable[[Path], None]) -> None:
    """Write a model to ``run/best``; the one there stays until the new one is whole."""
    target, staging, old = run / BEST, run / f"{BEST}.partial", run / f"{BEST}.old"
    for left in (staging, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        with writing(target):
            write(staging)
            if target.exists():
                os.rename(target, old)
            os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
