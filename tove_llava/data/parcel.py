"""A batch as one block of memory on its way from a data worker to the trainer.

torch hands every tensor over by a file descriptor of its own, for which the trainer connects to the worker and waits.
One block needs one.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import torch

ALIGNMENT = 64  # bytes: what vector instructions and dtypes want


class Parcel:
    """Is pickled as one tensor, and unpickled as what it was made of: tensors in CPU memory inside anything else."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        sorter = _Sorter(buffer)
        sorter.dump(self.content)
        places, end = [], 0
        for tensor in sorter.tensors:
            places.append((end, tensor.dtype, tuple(tensor.shape)))
            end += math.ceil(tensor.numel() * tensor.element_size() / ALIGNMENT) * ALIGNMENT
        block = torch.empty(end, dtype=torch.uint8)
        for tensor, place in zip(sorter.tensors, places, strict=True):
            _view(block, *place).copy_(tensor)
        return _unpack, (buffer.getvalue(), block, places)


class _Sorter(pickle.Pickler):
    """Pickles everything but tensors, which it lists."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, thing: Any) -> int | None:
        if not isinstance(thing, torch.Tensor):
            return None
        self.tensors.append(thing)
        return len(self.tensors) - 1


class _Joiner(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: Any) -> torch.Tensor:
        return self._tensors[number]


def _unpack(rest: bytes, block: torch.Tensor, places: list[tuple[int, torch.dtype, tuple[int, ...]]]) -> Any:
    return _Joiner(io.BytesIO(rest), [_view(block, *place) for place in places]).load()


def _view(block: torch.Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
