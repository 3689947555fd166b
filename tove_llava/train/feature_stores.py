"""Store features in shards: as they are, rounded, or compressed.

A shard is a safetensors file that is mapped into memory. A row of each of its tensors belongs to one image. A new way
to store values is a new entry of :data:`STORES`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.files import writing

BLOCK = 32  # most values that share a scale

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Store:
    """A way to store features."""

    pack: Callable[[np.ndarray], Tensors]  # float32 [B,C,...] -> tensors of B rows
    unpack: Callable[[Mapping[str, np.ndarray]], np.ndarray]


def _block_size(positions: int) -> int:
    """Split positions into blocks of at most :data:`BLOCK`, as equal as possible."""
    return math.ceil(positions / math.ceil(positions / BLOCK))


def _to_blocks(values: np.ndarray) -> np.ndarray:
    """Turn ``[B,C,...]`` into ``[B,C,blocks,block]``, with zeros after the last position."""
    flat = values.reshape(*values.shape[:2], -1)  # [B,C,P]
    block = _block_size(flat.shape[2])
    flat = np.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % block)))
    return flat.reshape(*flat.shape[:2], -1, block)


def _pack_int8(values: np.ndarray) -> Tensors:
    """Pack 8 bits a value, with a float32 scale for each block.

    As in GGUF's Q8_0 the largest value of a block becomes 127. ``gguf.quants`` itself does not fit: its scales are
    float16, its blocks always have 32 values, and it rounds halves in another way. Blocks lie within a channel because
    the channels of a token differ in size by orders of magnitude.
    """
    blocks = _to_blocks(values)
    scales = np.abs(blocks).max(-1) / np.float32(127)  # [B,C,blocks]
    divisors = np.where(scales == 0, np.float32(1), scales)[..., None]
    rounded = np.rint(blocks / divisors).astype(np.int8).reshape(*values.shape[:2], -1)
    rounded = rounded[:, :, : math.prod(values.shape[2:])].reshape(values.shape)
    return {"values": np.ascontiguousarray(rounded), "scales": scales}


def _unpack_int8(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    values, scales = tensors["values"], tensors["scales"]
    blocks = _to_blocks(values) * scales[..., None]
    flat = blocks.reshape(*values.shape[:2], -1)[:, :, : math.prod(values.shape[2:])]
    return flat.reshape(values.shape)


def _pack_float16(values: np.ndarray) -> Tensors:
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise ConfigError(f"features up to {np.abs(values).max():.3g} do not fit into float16; store int8 or float32")
    return {"values": rounded}


STORES = {
    "float32": Store(pack=lambda values: {"values": values}, unpack=lambda tensors: tensors["values"]),
    "float16": Store(pack=_pack_float16, unpack=lambda tensors: tensors["values"]),
    "int8": Store(pack=_pack_int8, unpack=_unpack_int8),
}


def write_shard(file: Path, values: np.ndarray, store: str) -> None:
    """Write a shard atomically.

    Args:
        values: float32 ``[B,C,...]``, finite.
        store: key of :data:`STORES`.

    Raises:
        CheckpointError: the disk is full or read-only.
        ConfigError: a value is too large to be stored like this.
    """
    staged = file.with_name(file.name + ".part")
    with writing(file):
        file.parent.mkdir(exist_ok=True)
        try:
            save_file(STORES[store].pack(values), staged)
            os.replace(staged, file)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise


class Shards:
    """The shards of one part of a cache, opened when needed."""

    def __init__(self, files: Sequence[Path], rows: int, store: str) -> None:
        self._files, self._rows, self._store = files, rows, store
        self._open: dict[int, safe_open] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # another process opens them again

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """Return ``[len(rows),C,...]``, float16 if the cache stores float16, else float32.

        Raises:
            DataError: a file is damaged.
        """
        found: dict[str, list[np.ndarray]] = {}
        for row in rows:
            for name, tensor in self._row(*divmod(row, self._rows)).items():
                found.setdefault(name, []).append(tensor)
        return STORES[self._store].unpack({name: np.concatenate(tensors) for name, tensors in found.items()})

    def _row(self, shard: int, row: int) -> Tensors:
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(self._files[shard], framework="numpy")
            file = self._open[shard]
            return {name: file.get_slice(name)[row : row + 1] for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{self._files[shard]} is damaged ({error}); delete it and run 'tove-llava features' again"
            ) from error
