"""A batch in one block of memory, for transfer between processes.

torch passes each tensor by its own file descriptor, for which the trainer connects to the worker and waits. One block
needs one descriptor.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import torch

ALIGNMENT = 64  # bytes: what vector instructions and dtypes want


class PackedBatch:
    """Pickles nested data with its CPU tensors as one tensor."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump(self.content)
        views, end = [], 0
        for tensor in pickler.tensors:
            views.append((end, tensor.dtype, tuple(tensor.shape)))
            end += math.ceil(tensor.numel() * tensor.element_size() / ALIGNMENT) * ALIGNMENT
        block = torch.empty(end, dtype=torch.uint8)
        for tensor, view in zip(pickler.tensors, views, strict=True):
            _view(block, *view).copy_(tensor)
        return _unpack, (buffer.getvalue(), block, views)


class _Pickler(pickle.Pickler):
    """Pickles everything but tensors, which it collects."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, thing: Any) -> int | None:
        if not isinstance(thing, torch.Tensor):
            return None
        self.tensors.append(thing)
        return len(self.tensors) - 1


def _unpack(rest: bytes, block: torch.Tensor, views: list[tuple[int, torch.dtype, tuple[int, ...]]]) -> Any:
    unpickler = pickle.Unpickler(io.BytesIO(rest))
    unpickler.persistent_load = lambda number: _view(block, *views[number])  # type: ignore[method-assign]
    return unpickler.load()


def _view(block: torch.Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
