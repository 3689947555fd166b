"""Read the weights of a folder, which is untrusted input.

Tensors are mapped from the disk: one costs memory when it is used, whatever the size of its file. The mapping is
private, so no change of a tensor reaches the file.
"""

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tove_llava.core.errors import CheckpointError
from tove_llava.core.files import read_json_object
from tove_llava.core.finite import check_finite
from tove_llava.core.paths import inside

Tensors = dict[str, Tensor]

_STEMS = (
    ("model", ".safetensors"),
    ("pytorch_model", ".bin"),
)  # in transformers' order of search

# Values that older transformers saved, though the configuration determines them.
_DERIVED = (".rotary_emb.inv_freq", ".embeddings.position_ids")


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds a model's weights, whole or in shards."""
    return any(any(folder.glob(f"{stem}*{suffix}")) for stem, suffix in _STEMS) or any(
        (folder / f"{stem}{suffix}.index.json").is_file() for stem, suffix in _STEMS
    )


def folder_tensors(folder: Path) -> Tensors:
    """Map all tensors of a folder's safetensors or PyTorch weights by name."""
    for stem, suffix in _STEMS:
        whole = folder / f"{stem}{suffix}"
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return _without_derived(_shards(index))
        if whole.is_file():
            return _without_derived(file_tensors(whole))
        parts = sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
        if parts:
            raise CheckpointError(f"{folder} holds shards ({parts[0].name}) but not {index.name}, which says what is "
                                  "in them; the copy is incomplete")  # fmt: skip
    raise CheckpointError(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor shards")


def file_tensors(file: Path) -> Tensors:
    """Map the tensors of one file; nothing but tensors is unpickled."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; the checkpoint is incomplete")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as handle:
                return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or damaged ({error}); copy it again") from error
    try:
        # Pickles from before torch 1.6 cannot be mapped, and are read.
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is damaged, or holds pickled objects other than tensors, which are not loaded because that would "
            f"run code from the file: {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # damaged pickles raise errors of many kinds
        raise CheckpointError(f"{file} is truncated or damaged ({_first_line(error)}); copy it again") from error
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise CheckpointError(f"{file} is not a table of tensors by name, as weights are")
    return {name: value.detach() for name, value in found.items()}


def split_by_prefix(tensors: Tensors, table: Iterable[tuple[str, str, str]], where: Path) -> dict[str, Tensors]:
    """Sort tensors into parts.

    Args:
        table: (prefix of the names, part, replacement of the prefix); the first that fits counts.
    """
    table = list(table)
    found: dict[str, Tensors] = {part: {} for _, part, _ in table}
    for name, value in tensors.items():
        fitting = next((row for row in table if name.startswith(row[0])), None)
        if fitting is None:
            raise CheckpointError(f"{where}: there is no place for the tensor {name!r} in a LLaVA-1.5")
        prefix, part, instead = fitting
        new = instead + name.removeprefix(prefix)
        if new in found[part]:
            raise CheckpointError(f"{where}: the tensor {name!r} is there twice, under two names")
        found[part][new] = value
    return found


def check_tensors(found: Tensors, expected: nn.Module, what: str, where: Path, optional: Iterable[str] = ()) -> None:
    """Compare names, shapes and kinds of tensors with a module's."""
    shapes = {name: tuple(value.shape) for name, value in expected.state_dict().items()}
    missing = sorted(shapes.keys() - found.keys() - set(optional))
    if missing:
        raise CheckpointError(f"{where}: {what}: {len(missing)} tensor(s) missing, such as {missing[0]!r}; the "
                              "checkpoint is incomplete, or config.json is another model's")  # fmt: skip
    extra = sorted(found.keys() - shapes.keys())
    if extra:
        raise CheckpointError(f"{where}: {what}: {len(extra)} tensor(s) that config.json does not know, such as "
                              f"{extra[0]!r}")  # fmt: skip
    for name, value in found.items():
        if tuple(value.shape) != shapes[name]:
            raise CheckpointError(f"{where}: {what}: {name!r} is {list(value.shape)}, but config.json asks for "
                                  f"{list(shapes[name])}")  # fmt: skip
        if not value.is_floating_point():
            raise CheckpointError(f"{where}: {what}: {name!r} is {value.dtype}: quantised weights cannot be converted; "
                                  "take the checkpoint in 16 bits")  # fmt: skip
    check_finite(found.items(), where)


def write_json(file: Path, data: dict[str, Any]) -> None:
    """Write a JSON object as transformers does."""
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def weight_map(index: Path) -> dict[str, str]:
    """Read which file of an index's folder holds which tensor."""
    found = read_json_object(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{index} is damaged: it has no 'weight_map' of file names")
    for name in set(found.values()):
        inside(index.parent, name, index.name)
    return found


def _shards(index: Path) -> Tensors:
    placed = weight_map(index)
    files = sorted(set(placed.values()))
    absent = [name for name in files if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(f"{index.parent}: {len(absent)} of {len(files)} shards are missing, such as {absent[0]}; "
                              "copy them again")  # fmt: skip
    found: Tensors = {}
    for file in files:
        held = file_tensors(index.parent / file)
        lost = sorted(name for name, place in placed.items() if place == file and name not in held)
        if lost:
            raise CheckpointError(
                f"{index.parent / file} lacks the tensor {lost[0]!r}, which {index.name} places there"
            )
        found |= held
    return found


def _without_derived(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.endswith(_DERIVED)}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
