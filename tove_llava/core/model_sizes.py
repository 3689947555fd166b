"""Compare the sizes in a ``config.json`` with the weights next to it, before anything of that size is made."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tove_llava.core.errors import CheckpointError
from tove_llava.core.files import read_json_object
from tove_llava.core.paths import check_folder

# The largest value of each key that a model of today could have, times a hundred or so.
_LARGEST = {
    "num_hidden_layers": 2**10, "num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**16,
    "hidden_size": 2**18, "intermediate_size": 2**22, "projection_dim": 2**18, "vocab_size": 2**24,
    "max_position_embeddings": 2**32, "image_size": 2**15, "patch_size": 2**15, "num_channels": 2**10,
    "image_seq_length": 2**20,
}  # fmt: skip
_DIMENSIONS = ("hidden_size", "intermediate_size", "vocab_size")  # each is one of some weight's
_LAYER = re.compile(r"(?:layers?|blocks|h)\.(\d+)\.")
_SPARE_LAYERS = 8  # CLIP may be stored without the blocks above the tokens that are used

Shapes = Mapping[str, Sequence[int]]


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read a folder's ``config.json``, {} if there is none; check its sizes.

    Raises:
        CheckpointError: the file is damaged, a size is impossible or not that of the weights in the folder, or a file
            lies outside the folder.
    """
    if folder.is_dir():
        check_folder(folder)
    file = folder / "config.json"
    if not os.path.lexists(file):
        return {}
    config = read_json_object(file)
    for path, key, value in _sizes(config):
        if value < 0 or value > _LARGEST[key] or (value == 0 and key in _DIMENSIONS):
            raise CheckpointError(f"{file}: {path} is {value}, which no model has; the file is damaged")
    # A ToVE tower names its CLIP by source.
    own = {
        key: part for key, part in config.items() if key not in ("vision_config", "clip_config") or not _is_tove(part)
    }
    check_sizes({} if _is_tove(config) else own, stored_shapes(folder), file)
    return config


def check_sizes(config: Mapping[str, Any], shapes: Shapes, where: str | os.PathLike[str]) -> None:
    """Raise CheckpointError for more layers, or wider ones, than the weights have.

    Args:
        shapes: of the weights that belong to the configuration, by name.
    """
    layers = [int(found) for name in shapes for found in _LAYER.findall(name)]
    widest = max((size for shape in shapes.values() for size in shape), default=0)
    for path, key, value in _sizes(config):
        if key == "num_hidden_layers" and layers and value > max(layers) + 1 + _SPARE_LAYERS:
            raise CheckpointError(f"{where}: {path} is {value}, but the weights hold {max(layers) + 1} layers")
        spare = 64 if "." in path else 1  # the weights of that part may be elsewhere, such as CLIP's text encoder
        if key in _DIMENSIONS and layers and value > widest * spare:
            raise CheckpointError(f"{where}: {path} is {value}, but no weight is wider than {widest}")


def _is_tove(config: Any) -> bool:
    return isinstance(config, dict) and config.get("model_type") == "tove_vision"


def _sizes(config: Any, path: str = "") -> Iterator[tuple[str, str, int]]:
    """Yield the path, key and value of every size in a configuration."""
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if key in _LARGEST and isinstance(value, int) and not isinstance(value, bool):
            yield f"{path}{key}", key, value
        elif isinstance(value, Mapping):
            yield from _sizes(value, f"{path}{key}.")


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Read the shapes in the headers of a model's weights, unless a file is missing or damaged."""
    shapes: dict[str, list[int]] = {}
    files = sorted(folder.glob("model*.safetensors"))
    shards = [file for file in files if "-of-" in file.name]
    if shards and not shards[0].name.endswith(f"-of-{len(shards):05d}.safetensors"):
        return {}  # only those that hold the tower, say
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                shapes |= {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return {}
    return shapes
