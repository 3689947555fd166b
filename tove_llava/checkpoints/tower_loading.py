"""Load the tower of a preset or of a model folder, without its language model.

A folder is the tower's own (``ToveVisionModel.save_pretrained``), a checkpoint of any kind
(:mod:`tove_llava.checkpoints.loading`), a model with a ToVE tower that transformers saved, or a LLaVA-1.5 of another
format, whose tower is only CLIP. A repository of the hub may hold each of them; only the tower's files are fetched.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaImageProcessorPil

from tove_llava.checkpoints.assemble import load_clip_of, tower_config
from tove_llava.checkpoints.base import Request, find_format, foreign_format
from tove_llava.checkpoints.hub import download
from tove_llava.checkpoints.manifest import ADAPTER, MANIFEST, TRAINED, Manifest
from tove_llava.checkpoints.plugin_records import check_plugins
from tove_llava.checkpoints.tensors import Tensors, file_tensors, folder_tensors, has_weights, weight_map
from tove_llava.checkpoints.weight_fingerprints import check_stored
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.finite import check_finite
from tove_llava.core.hub_access import asking
from tove_llava.core.model_sizes import read_model_config
from tove_llava.core.registry import closest
from tove_llava.core.safe_loading import from_pretrained
from tove_llava.llava.build import torch_dtype, vision_config
from tove_llava.presets import Preset, load_preset, preset_names
from tove_llava.tower import ToveVisionConfig, ToveVisionModel
from tove_llava.tower.pixels import image_processor

_PREFIXES = ("model.vision_tower.", "vision_tower.")  # of the tower's names in a LLaVA; the second is transformers' old
_INDEX = "model.safetensors.index.json"
_SMALL = ["*.json", TRAINED, "backbones/*", "README.md"]
_WHERE = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder", "proxies")
_FILES = ("processor_config.json", "preprocessor_config.json")


def load_tower(
    place: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    load_backbones: bool = True,
) -> ToveVisionModel:
    """Load or build a vision tower in eval mode, with its image processor as ``tower.processor``.

    Args:
        place: a preset's name or YAML file, for an untrained tower; a folder that training, ``save_pretrained`` or
            another LLaVA-1.5 wrote; or a repository of the hub, ``owner/name``. A folder that is called like a preset
            is ``./tiny``.
        overrides: ``key.path=value`` strings for a preset.
        dtype: of the whole tower; by default the preset's or the checkpoint's.
        device: the CPU by default.
        load_backbones: False leaves out CLIP and the experts.

    Returns:
        a tower that maps images to tokens: ``tower(images).last_hidden_state`` is ``[B,N,d]``. Only its ``fusion`` has
        parameters, so ``tower.parameters()`` are the trainable ones.

    Raises:
        CheckpointError: the folder or repository holds no tower, is incomplete, or names a source that is not there.
        ConfigError: no such preset, or a wrong key.

    Example:
        >>> tower = tove_llava.load_tower("tiny")
        >>> tower(image).last_hidden_state.shape
        torch.Size([1, 36, 192])
        >>> tower([image, image]).routing.shape  # [images, tokens, experts]
        torch.Size([2, 36, 4])
    """
    name = os.fspath(place)
    if name in preset_names() or name.endswith((".yaml", ".yml")):
        tower = build_tower(name, overrides=overrides, dtype=dtype, load_backbones=load_backbones)
    elif overrides:
        raise ConfigError(f"overrides apply to a preset, and {name!r} is none. Presets: {', '.join(preset_names())}")
    else:
        name = name.removeprefix("hf:")
        if not os.path.isdir(name) and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
            raise CheckpointError(
                f"{name!r} is no folder, no preset and no repository (owner/name).{closest(name, preset_names())} "
                f"Presets: {', '.join(preset_names())}"
            )
        if not os.path.isdir(name) and download(name, {}, _SMALL) is None:
            raise CheckpointError(f"{name} cannot be fetched: there is no such model on the hub, or no way to it")
        options = {} if dtype is None else {"dtype": torch_dtype(dtype)}
        tower = from_pretrained(ToveVisionModel, name, "the tower", load_backbones=load_backbones, **options)
    return tower.to(device or "cpu").eval()


def build_tower(
    preset: str | Preset,
    *,
    overrides: Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    load_backbones: bool = True,
    seed: int = 42,
) -> ToveVisionModel:
    """Build a preset's tower with new trainable parts; see :func:`load_tower`.

    Args:
        seed: of the initial values, which depend on nothing else.
    """
    if isinstance(preset, str):
        preset = load_preset(preset, overrides)
    elif overrides:
        raise ConfigError("overrides apply to a preset's name or path, not to a Preset that is loaded already")
    config = vision_config(preset.vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = ToveVisionModel(config).to(torch_dtype(dtype or preset.language.dtype))
    if preset.stages:
        tower.processor = image_processor(config, list(preset.stages.values())[-1].image_aspect_ratio)
    return tower.load_backbones() if load_backbones else tower


def open_tower(
    read: Callable[..., Any], place: str | os.PathLike[str], options: dict[str, Any], load_backbones: bool
) -> Any:
    """Open a folder or repository as ``ToveVisionModel.from_pretrained`` does, and return what it returns.

    Args:
        read: transformers' own ``from_pretrained``.
        options: its keyword arguments.
    """
    folder = _folder(os.fspath(place), options)
    if folder is None:
        with asking(os.fspath(place)):
            return read(place, **options)  # which explains why there is no such folder
    options = {key: value for key, value in options.items() if key not in _WHERE}
    config = read_model_config(folder)
    if config.get("model_type") == "tove_vision":
        if has_weights(folder):
            loaded = read(str(folder), **options)
        else:  # complete, if nothing of the tower trains
            loaded = _filled(read, folder, _vision(config, options), {}, options, "square")
        if any((folder / name).is_file() for name in _FILES):
            _model(loaded).processor = from_pretrained(LlavaImageProcessorPil, folder, "the image processor")
    elif _holds_tower(config):
        loaded = _from_llava(read, folder, config, options)
    elif foreign_format(folder) is not None:
        loaded = _from_clip(read, folder, options, load_backbones)
    else:
        raise _no_tower(folder, config)
    check_finite(_model(loaded).named_parameters(), folder)
    if load_backbones:
        _model(loaded).load_backbones(base_dir=folder)
    return loaded


def _folder(place: str, options: dict[str, Any]) -> Path | None:
    """Return a folder, or the local copy of a repository's files that concern the tower."""
    if os.path.isdir(place):
        return Path(place, options.get("subfolder") or "")
    folder = download(place, options, _SMALL)
    if folder is None or (folder / TRAINED).is_file():
        return folder
    config = read_model_config(folder)
    files = ["*.safetensors", "*.model", "*.json"]
    if config.get("model_type") == "tove_vision" or _holds_tower(config):
        index = folder / _INDEX
        files = _shards(index) if index.is_file() else ["model.safetensors"]
    return download(place, options, files)


def _holds_tower(config: dict[str, Any]) -> bool:
    """Tell if a configuration is a LLaVA's with a ToVE tower."""
    vision = config.get("vision_config")
    return isinstance(vision, dict) and vision.get("model_type") == "tove_vision"


def _from_llava(read: Callable[..., Any], folder: Path, config: dict[str, Any], options: dict[str, Any]) -> Any:
    """Read the tower out of a LLaVA's folder."""
    manifest = None
    if (folder / MANIFEST).is_file() or (folder / TRAINED).is_file():
        manifest = Manifest.read(folder)  # refuses a checkpoint that is not complete
        check_plugins(folder, manifest)
    vision = _vision(config["vision_config"], options)
    if manifest is not None and not {"dtype", "torch_dtype"} & options.keys():
        options["dtype"] = torch_dtype(manifest.language["dtype"])
    aspect = manifest.image_aspect_ratio if manifest is not None else config.get("image_aspect_ratio") or "square"
    loaded = _filled(read, folder, vision, _tower_tensors(folder), options, aspect)
    if manifest is not None and manifest.kind != "full" and (manifest.kind != "lora" or (folder / ADAPTER).is_file()):
        check_stored(folder, manifest)  # of a whole model, the language model is not read; of a repository, no adapter
    return loaded


def _vision(config: dict[str, Any], options: dict[str, Any]) -> ToveVisionConfig:
    """Return the given configuration or a folder's, with the keys that are given among the options."""
    vision = options.pop("config", None) or ToveVisionConfig.from_dict(config)
    for key in {field.name for field in dataclasses.fields(vision)} & options.keys() - {"dtype"}:
        setattr(vision, key, options.pop(key))
    return vision


def _from_clip(read: Callable[..., Any], folder: Path, options: dict[str, Any], load_backbones: bool) -> Any:
    """Make a tower of the CLIP of a LLaVA-1.5."""
    part = find_format(folder).read_tower(folder, Request())
    by_value = part.clip.tensors is not None  # saved towers then hold it too
    vision = tower_config(part.clip, folder, clip_source="hf:./backbones/clip" if by_value else None)
    loaded = _filled(read, folder, vision, {}, options, part.image_aspect_ratio)
    if load_backbones:
        load_clip_of(part.clip, _model(loaded))
    return loaded


def _filled(
    read: Callable[..., Any],
    folder: Path,
    vision: ToveVisionConfig,
    tensors: Tensors,
    options: dict[str, Any],
    image_aspect_ratio: str,
) -> Any:
    """Build a tower by transformers' own loading, with every tensor in its place."""
    wants_info = options.pop("output_loading_info", False)
    vision.name_or_path = str(folder)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which is checked below
    tower, info = read(None, config=vision, state_dict=tensors, **options)
    odd = [sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    if any(odd):
        raise CheckpointError(
            f"{folder}: the tower's weights and config.json do not belong together: missing {odd[0][:2]}, unexpected "
            f"{odd[1][:2]}, other shapes {odd[2][:2]}"
        )
    tower.processor = image_processor(vision, image_aspect_ratio)
    return (tower, info) if wants_info else tower


def _tower_tensors(folder: Path) -> Tensors:
    """Map the tower's trained tensors; other shards of a model may be missing."""
    if (folder / TRAINED).is_file():
        found = file_tensors(folder / TRAINED)
    elif (folder / _INDEX).is_file():
        found = {name: x for file in _shards(folder / _INDEX) for name, x in file_tensors(folder / file).items()}
    else:
        found = folder_tensors(folder)
    prefixed = ((name, value, next((p for p in _PREFIXES if name.startswith(p)), "")) for name, value in found.items())
    return {name.removeprefix(prefix): value for name, value, prefix in prefixed if prefix}


def _shards(index: Path) -> list[str]:
    """List the files that hold the tower's tensors, by the index of a folder's weights."""
    return sorted({file for name, file in weight_map(index).items() if name.startswith((*_PREFIXES, "fusion."))})


def _model(loaded: Any) -> ToveVisionModel:
    return loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True returns a pair


def _no_tower(folder: Path, config: dict[str, Any]) -> CheckpointError:
    if (folder / MANIFEST).is_file():
        return CheckpointError(f"{folder} lacks a readable config.json; the checkpoint is damaged")
    if config:
        return CheckpointError(
            f"{folder} holds no ToVE tower: its config.json says model_type {config.get('model_type')!r}. Give a "
            "checkpoint of tove-llava train, a folder of ToveVisionModel.save_pretrained, or a LLaVA-1.5"
        )
    try:
        Manifest.read(folder)  # says what the folder is instead
    except CheckpointError as error:
        return error
    return CheckpointError(f"{folder} holds no ToVE tower")
