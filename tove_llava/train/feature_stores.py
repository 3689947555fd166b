"""How cached features lie on disk: shards of some images each, their values as they are, rounded, or compressed.

A shard is one safetensors file, mapped into memory when it is read; a row of each of its tensors belongs to one image.
Another way to store values is one entry of :data:`STORES`.
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

BLOCK = 32  # values that share a scale, at most

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Store:
    """One way to keep features.

    Args:
        pack: float32 ``[B,C,...]``, channels before positions, to tensors with B rows each.
        unpack: the other way.
    """

    pack: Callable[[np.ndarray], Tensors]
    unpack: Callable[[Mapping[str, np.ndarray]], np.ndarray]


def _block_size(positions: int) -> int:
    """Positions of one scale: as equal as they come, at most :data:`BLOCK`."""
    return math.ceil(positions / math.ceil(positions / BLOCK))


def _to_blocks(values: np.ndarray) -> np.ndarray:
    """``[B,C,...]`` to ``[B,C,blocks,block]``, zeros behind the last position."""
    flat = values.reshape(*values.shape[:2], -1)  # [B,C,P]
    block = _block_size(flat.shape[2])
    flat = np.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % block)))
    return flat.reshape(*flat.shape[:2], -1, block)


def _pack_int8(values: np.ndarray) -> Tensors:
    """Eight bits a value and a scale for each block of neighbouring positions of one channel.

    The rule is that of GGUF's Q8_0, which has blocks of 32 as well: the largest value of a block becomes 127. Blocks
    lie within a channel because the channels of one token differ in size by orders of magnitude.
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
    """Writes a shard, whole or not at all.

    Args:
        values: float32 ``[B,C,...]``, finite.
        store: key of :data:`STORES`.

    Raises:
        ConfigError: a value is too large to be stored like this.
    """
    file.parent.mkdir(exist_ok=True)
    staged = file.with_name(file.name + ".part")
    save_file(STORES[store].pack(values), staged)
    os.replace(staged, file)


class Shards:
    """The shards of one part of a cache, opened when a row of theirs is first read."""

    def __init__(self, files: Sequence[Path], rows: int, store: str) -> None:
        self._files, self._rows, self._store = files, rows, store
        self._open: dict[int, safe_open] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # another process opens them again

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """``[len(rows),C,...]`` float32, or float16 where that is stored.

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
