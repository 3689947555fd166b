"""Speed of a tower on this machine, where detached experts are skipped."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tove_llava.analysis.measure import Subset, without
from tove_llava.core.errors import ConfigError
from tove_llava.tower import ToveVisionModel


@torch.inference_mode()
def seconds(tower: ToveVisionModel, subsets: Sequence[Subset], batch: int, rounds: int) -> list[float]:
    """Measure the tower's median seconds for one batch, by subset left out.

    The subsets take turns within each round, so that other load on the machine slows all of them.

    Args:
        batch: images of noise in a batch.
        rounds: timed batches of each subset, after one that is not counted.
    """
    size = tower.config.image_size
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(tower.device, tower.dtype)
    times: list[list[float]] = [[] for _ in subsets]
    for _ in range(rounds + 1):
        for subset, taken in zip(subsets, times, strict=True):
            with without(tower, subset):
                _wait(tower.device)
                started = time.perf_counter()
                tower(pixels)
                _wait(tower.device)
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken[1:]) for taken in times]


@dataclass(frozen=True)
class Fit:
    """Experts to remove for a latency.

    Attributes:
        removed: experts to leave out.
        milliseconds, whole: time of the tower for one image without them, and with all experts.
    """

    removed: tuple[str, ...]
    milliseconds: float
    whole: float

    def __str__(self) -> str:
        return f"{self.milliseconds:.2f} ms for one image, with all experts {self.whole:.2f} ms"


def fit_latency(tower: ToveVisionModel, ranking: Sequence[str], limit_ms: float, rounds: int = 15) -> Fit:
    """Leave out experts until one image takes the tower ``limit_ms``.

    Raises:
        ConfigError: plain CLIP takes longer.
    """
    subsets = [tuple(ranking[:count]) for count in range(len(ranking) + 1)]
    times = [1000 * value for value in seconds(tower, subsets, batch=1, rounds=rounds)]
    for subset, taken in zip(subsets, times, strict=True):
        if taken <= limit_ms:
            return Fit(subset, taken, times[0])
    raise ConfigError(
        f"--max-latency-ms {limit_ms:g}: with all experts the tower takes {times[0]:.2f} ms for one image on "
        f"{tower.device}, and plain CLIP still {times[-1]:.2f} ms; allow more time, or use a faster device or dtype"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
