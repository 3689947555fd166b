"""Orders of records that limit padding and mixed modalities in batches."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from tove_llava.core.errors import ConfigError, DataError


def length_grouped_indices(
    lengths: Sequence[int], batch_size: int, num_batches: int, generator: torch.Generator | None = None
) -> list[int]:
    """Draw one epoch's order, in which neighbours have similar lengths.

    A random permutation is cut into megabatches of ``batch_size * num_batches``; each is sorted, longest first, and
    dealt into ``num_batches`` batches of about equal total length (LLaVA's ``get_length_grouped_indices``).

    Args:
        lengths: length of each record.
        batch_size: records per device and step.
        num_batches: batches of one optimizer step: world size times gradient accumulation.
        generator: source of the permutation; None is torch's global one.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * num_batches
    grouped: list[int] = []
    for start in range(0, len(order), size):
        megabatch = sorted(order[start : start + size], key=lambda index: lengths[index], reverse=True)
        for batch in _deal(megabatch, lengths, num_batches):
            grouped += batch
    return grouped


def _deal(indices: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    if len(indices) % count:
        return [list(indices[start::count]) for start in range(count)]
    full = len(indices) // count
    batches: list[list[int]] = [[] for _ in range(count)]
    totals: list[float] = [0.0] * count
    for index in indices:
        lightest = totals.index(min(totals))
        batches[lightest].append(index)
        totals[lightest] += lengths[index]
        if len(batches[lightest]) == full:
            totals[lightest] = float("inf")
    return batches


def modality_grouped_indices(
    lengths: Sequence[int], batch_size: int, num_batches: int, generator: torch.Generator | None = None
) -> list[int]:
    """Draw one epoch's order in megabatches of one modality.

    Like LLaVA's ``get_modality_length_grouped_indices``, group each modality by length and cut it into megabatches. Set
    the last megabatch of each aside and shuffle the others together. The two set aside come last, sorted by index.

    Args:
        lengths: as for :func:`length_grouped_indices`, negative for text-only records.

    Raises:
        DataError: a length is zero, so that its modality is unknown.
    """
    if any(length == 0 for length in lengths):
        raise DataError("a record of length 0 cannot be grouped by modality; give each record some text")
    if all(length > 0 for length in lengths) or all(length < 0 for length in lengths):
        return length_grouped_indices(lengths, batch_size, num_batches, generator)
    size = batch_size * num_batches
    megabatches: list[list[int]] = []
    tail: list[int] = []
    for sign in (1, -1):
        members = [index for index, length in enumerate(lengths) if sign * length > 0]
        grouped = length_grouped_indices(
            [sign * lengths[index] for index in members], batch_size, num_batches, generator
        )
        order = [members[index] for index in grouped]
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        megabatches += chunks[:-1]
        tail += chunks[-1]
    shuffled = torch.randperm(len(megabatches), generator=generator).tolist()
    return [index for number in shuffled for index in megabatches[number]] + sorted(tail)


class LengthGroupedSampler(Sampler[int]):
    """Draws epochs of :func:`modality_grouped_indices` or :func:`length_grouped_indices`.

    With a ``seed``, an epoch's order depends only on seed and epoch, so a resumed run continues the order that it was
    interrupted in; call :meth:`set_epoch` as for torch's distributed sampler. Without a seed each epoch draws from
    ``generator``, or from torch's global generator as LLaVA does.

    Args:
        lengths: signed as in :attr:`LlavaDataset.modality_lengths`.
        batch_size: per device.
        num_batches: world size times gradient accumulation.
        by_modality: separate image and text-only records; otherwise only lengths count.
        seed: makes the order a function of the epoch.
        generator: used without a seed.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        num_batches: int,
        by_modality: bool = True,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if batch_size < 1 or num_batches < 1:
            raise ConfigError(f"batch_size ({batch_size}) and num_batches ({num_batches}) must be positive")
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.by_modality = by_modality
        self.seed = seed
        self.generator = generator
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration (with a seed)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = self.generator
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.order(self.lengths, generator))

    def order(self, lengths: Sequence[int], generator: torch.Generator | None) -> list[int]:
        """Draw an order of records of these lengths."""
        draw = modality_grouped_indices if self.by_modality else length_grouped_indices
        return draw(np.asarray(lengths).tolist(), self.batch_size, self.num_batches, generator)


class WeightedSampler(Sampler[int]):
    """Draws each file's share of an epoch, as its weight says.

    An epoch has ``round(weight * size)`` records of a file, at least one: all of them as often as the weight has whole
    parts, and a stretch of a fixed permutation for the rest. The next epoch goes on where the stretch ends, so records
    are seen equally often in the long run. An epoch depends only on seed and epoch.

    Args:
        sizes: records of each file, one file after the other.
        weights: of each file.
        seed: of the permutations and orders.
        grouped: groups the records of an epoch by length; a plain random order without it.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        grouped: LengthGroupedSampler | None = None,
    ) -> None:
        self.sizes, self.seed, self.grouped = sizes, seed, grouped
        self.counts = [max(round(w * n), 1) if n else 0 for n, w in zip(sizes, weights, strict=True)]
        self.epoch = 0

    def __len__(self) -> int:
        return sum(self.counts)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def draw(self) -> torch.Tensor:
        """Return the records of the epoch, file by file."""
        parts, start = [torch.empty(0, dtype=torch.long)], 0
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if size:
                whole, rest = divmod(count, size)
                generator = torch.Generator().manual_seed(self.seed + number)
                stretch = (self.epoch * rest + torch.arange(rest)) % size
                parts += [start + torch.arange(size)] * whole
                parts.append(start + torch.randperm(size, generator=generator)[stretch])
            start += size
        return torch.cat(parts)

    def __iter__(self) -> Iterator[int]:
        drawn, generator = self.draw(), torch.Generator().manual_seed(self.seed + self.epoch)
        if self.grouped is None:
            return iter(drawn[torch.randperm(len(drawn), generator=generator)].tolist())
        order = self.grouped.order(self.grouped.lengths[drawn.numpy()], generator)
        return iter(drawn[order].tolist())
