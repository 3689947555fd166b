"""Read CLIP's vision encoder from a folder, and write it to one."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from tove_llava.checkpoints.parts import ClipPart
from tove_llava.checkpoints.tensors import Tensors, folder_tensors, write_json
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.safe_loading import from_pretrained
from tove_llava.core.sources import Source
from tove_llava.presets import load_preset, preset_names

_PREFIX = "vision_model."  # of every name in files; transformers 5.6 and later drops it from modules
_NORM = "post_layernorm."
_NAME = "_name_or_path"  # transformers' own key for where a model came from


def clip_config(source: str, advice: str) -> CLIPVisionConfig:
    """Return CLIP's architecture as a preset records it, else from its source.

    Args:
        advice: end of the error message.
    """
    for name in preset_names():
        vision = load_preset(name).vision
        if vision.clip == source and vision.clip_config is not None:
            return CLIPVisionConfig(**vision.clip_config)
    try:
        return from_pretrained(CLIPVisionConfig, Source.parse(source), "CLIP's configuration")
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{error}. {advice}") from error


def read_normalisation(folder: Path | None) -> dict[str, list[float]]:
    """Read mean and standard deviation from ``preprocessor_config.json``, if it exists."""
    file = None if folder is None else folder / "preprocessor_config.json"
    if file is None or not file.is_file():
        return {}
    data = read_json_object(file)
    try:
        return {key: [float(x) for x in data[key]] for key in ("image_mean", "image_std")}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from error


def read_clip(folder: Path, depth: int) -> ClipPart:
    """Read a folder's CLIP by value.

    A checkpoint may hold CLIP only up to the block whose tokens are used, without the norm after the last one. LLaVA
    does not use that norm; a neutral one makes the encoder whole.

    Args:
        depth: number of blocks below the tokens that are used.
    """
    config = clip_config(f"hf:{folder}", "The folder is incomplete")
    found = folder_tensors(folder)
    inner = {name.removeprefix(_PREFIX): value for name, value in found.items() if name.startswith(_PREFIX)}
    tensors: Tensors = inner or found  # a whole CLIP also has a text encoder
    if not any(name.startswith(_NORM) for name in tensors):
        like = tensors.get("embeddings.class_embedding", torch.zeros(config.hidden_size))
        tensors = tensors | {_NORM + "weight": torch.ones_like(like), _NORM + "bias": torch.zeros_like(like)}
    config.dtype = None
    name = read_json_object(folder / "config.json").get(_NAME, "")
    return ClipPart(
        config=config,
        layer=depth - config.num_hidden_layers - 1,
        tensors=tensors,
        source=f"hf:{name}" if is_hub_name(name) else "",
        normalisation=read_normalisation(folder),
    )


def fetch_clip(part: ClipPart) -> ClipPart:
    """Return the part by value, from its source."""
    if part.tensors is not None:
        return part
    source = Source.parse(part.source)
    if source.path is not None:
        return read_clip(source.require(), part.depth)
    revision = part.revision or "main"
    clip, info = from_pretrained(
        CLIPVisionModel, source, "CLIP", revision=revision, dtype="auto", output_loading_info=True
    )
    if info["missing_keys"]:
        raise CheckpointError(f"{source} lacks CLIP's {sorted(info['missing_keys'])[0]!r}")
    return replace(part, tensors=dict(clip.state_dict()))


def has_published_names(part: ClipPart) -> bool:
    """Return whether transformers 4 reads a reference's names of weights."""
    source = Source.parse(part.source)
    if source.path is None:
        return True
    return any(name.startswith(_PREFIX) for name in folder_tensors(source.require()))  # others get random numbers


def save_clip(part: ClipPart, folder: Path) -> None:
    """Write a ``CLIPVisionModel``'s folder that every version of transformers reads."""
    assert part.tensors is not None
    folder.mkdir(parents=True)
    config = CLIPVisionConfig.from_dict(part.config.to_dict())
    config.architectures = ["CLIPVisionModel"]
    config.save_pretrained(folder)
    if part.source:
        file = folder / "config.json"  # transformers itself does not write this key
        name = Source.parse(part.source).target
        write_json(file, read_json_object(file) | {_NAME: name})
    tensors = {_PREFIX + name: value.contiguous() for name, value in part.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    size = config.image_size
    CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **part.normalisation
    ).save_pretrained(folder)


def is_hub_name(name: object) -> bool:
    """Return whether a recorded name is ``owner/repository`` and not a path."""
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).is_dir()
