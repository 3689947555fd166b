"""Gather the micro-batches of all ranks that make up one optimizer step.

Loss terms are defined over this global batch. Its numbers of supervised tokens and images are therefore exchanged once,
before the first micro-batch runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from tove_llava.tower import GateInputs


@dataclass
class Window:
    """The micro-batches of one optimizer step, on W ranks."""

    tokens: int  # supervised tokens of the global batch
    images: list[list[int]]  # [A][W]: images of each of the A micro-batches on each rank
    samples: int  # records of the global batch
    rank: int
    signal: int = 0  # that some rank received, or 0
    noise: torch.Tensor | None = None  # [G,N,S]: gate noise for the G images of the global batch
    always_tower: bool = False  # run the tower's trainable part even if no rank has an image
    step: int = 0
    gate_inputs: list[GateInputs] = field(default_factory=list)
    losses: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # and the records' indices

    @property
    def num_images(self) -> int:
        """Return the number of images of the global batch."""
        return sum(map(sum, self.images))

    @property
    def is_last(self) -> bool:
        """Return True in the last micro-batch."""
        return self.step == len(self.images) - 1

    @property
    def runs_tower(self) -> bool:
        """Return True if all ranks run the tower in this micro-batch.

        The last micro-batch carries the balance loss of the whole window, and so gradients of the gate.
        """
        return self.always_tower or sum(self.images[self.step]) > 0 or (self.is_last and self.num_images > 0)

    def first_non_finite(self) -> tuple[float | None, list[int]]:
        """Return the first loss that is not finite, and its records' indices; wait for the device."""
        losses = torch.stack([loss for loss, _ in self.losses]).tolist()
        for loss, (_, records) in zip(losses, self.losses, strict=True):
            if not math.isfinite(loss):
                return loss, records.tolist()
        return None, []

    def local_noise(self) -> torch.Tensor | None:
        """Return the noise of this rank's micro-batch, ``[images,N,S]``.

        Images are ordered by micro-batch, then rank, as the sampler deals records out. So an image gets the same noise
        in a batch of 8, on two ranks with 4 each, and in two micro-batches of 4.
        """
        if self.noise is None:
            return None
        before = sum(map(sum, self.images[: self.step])) + sum(self.images[self.step][: self.rank])
        return self.noise[before : before + self.images[self.step][self.rank]]


def open_window(
    batches: Sequence[Mapping[str, Any]], device: torch.device, *, always_tower: bool = False, signal: int = 0
) -> Window:
    """Exchange the counts of all micro-batches, and a signal. Every rank calls this."""
    counts = torch.zeros(len(batches), 4, dtype=torch.long)
    counts[:, 3] = signal
    for row, batch in enumerate(batches):
        counts[row, 0] = len(batch["supervised"])  # of the labels' shape, not values: they may be on a GPU by now
        images = batch.get("pixel_values") if batch.get("pixel_values") is not None else batch.get("vision_features")
        counts[row, 1] = 0 if images is None else len(images)
        bounds = batch.get("cu_seq_lens_q")
        counts[row, 2] = len(batch["labels"]) if bounds is None else len(bounds) - 1
    every = counts[None]
    rank = 0
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        rank = dist.get_rank()
        counts = counts.to(device)
        gathered = [torch.empty_like(counts) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, counts)
        every = torch.stack(gathered).cpu()  # [W,A,4]
    return Window(
        tokens=int(every[..., 0].sum()),
        images=every[..., 1].T.tolist(),
        samples=int(every[..., 2].sum()),
        rank=rank,
        signal=int(every[..., 3].max()),
        always_tower=always_tower,
    )


def draw_noise(shape: tuple[int, int, int], seed: int, step: int) -> torch.Tensor:
    """Draw a global batch's gate noise, the same on any device."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return torch.randn(shape, generator=generator)
