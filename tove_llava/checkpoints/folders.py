"""The model's ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` over checkpoint folders."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from tove_llava.checkpoints.hub import download, upload
from tove_llava.checkpoints.loading import read_config, read_model
from tove_llava.checkpoints.manifest import MANIFEST, Manifest
from tove_llava.checkpoints.origin import Origin
from tove_llava.checkpoints.plugin_records import check_plugins
from tove_llava.checkpoints.saving import save_adapted, save_whole
from tove_llava.checkpoints.tensors import write_json
from tove_llava.checkpoints.weight_fingerprints import start_check
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.finite import check_finite
from tove_llava.core.hub_access import asking
from tove_llava.core.model_sizes import read_model_config
from tove_llava.core.safe_loading import no_questions
from tove_llava.core.sources import Source
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration

# Arguments of from_pretrained that only matter until the folder is found.
_WHERE = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder", "proxies")
# Arguments that mean nothing when read_model reads the folder.
_UNUSED = (
    "adapter_kwargs", "trust_remote_code", "_from_auto", "_from_pipeline", "use_safetensors", "low_cpu_mem_usage",
    "weights_only", "_commit_hash", "local_files_only",
)  # fmt: skip
_COMMIT = ("create_pr", "commit_message", "commit_description")
_PLACES = ("auto", "balanced", "balanced_low_0", "sequential")


def open_folder(
    read: Callable[..., Any], place: str | os.PathLike[str], options: dict[str, Any]
) -> tuple[Any, str | os.PathLike[str]]:
    """Open a folder as ``from_pretrained`` does, without the backbones.

    Args:
        read: transformers' own ``from_pretrained``.
        place: a folder, or the name of a repository.
        options: its keyword arguments.

    Returns:
        what ``from_pretrained`` returns, and the folder that sources are relative to.
    """
    folder = (
        Path(place, options.get("subfolder") or "") if os.path.isdir(place) else download(os.fspath(place), options)
    )
    if folder is None:
        with asking(os.fspath(place)):
            return read(place, **options), place  # which explains why there is no such folder
    read_model_config(folder)
    options.setdefault("trust_remote_code", False)
    manifest = Manifest.read(folder) if (folder / MANIFEST).is_file() else None
    if manifest is not None:
        check_plugins(folder, manifest)
    finish = None
    if manifest is None or manifest.kind == "full":
        finish = start_check(folder, manifest) if manifest is not None else None
        with no_questions():
            loaded = read(str(folder), **{k: v for k, v in options.items() if k not in _WHERE})
    else:
        loaded = _read_parts(folder, {k: v for k, v in options.items() if k not in (*_WHERE, *_UNUSED)})
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    check_finite(model.named_parameters(), folder)
    if finish is not None:
        finish({name for name, _ in model.named_parameters()})
    if manifest is not None and model.origin is None:
        model.origin = Origin.of(model, folder, manifest)
    return loaded, model.config.name_or_path or folder  # for a folder of only adapters, their base model's folder


def _read_parts(folder: Path, options: dict[str, Any]) -> Any:
    """Read a model with the language model elsewhere, then apply the arguments."""
    dtype = next((options.pop(key) for key in ("dtype", "torch_dtype") if options.get(key) is not None), "auto")
    given, info = options.pop("config", None), options.pop("output_loading_info", False)
    attention = options.pop("attn_implementation", None)
    device_map = options.pop("device_map", None)
    offload = {key: options.pop(key) for key in ("max_memory", "offload_folder", "offload_buffers") if key in options}
    if options.pop("quantization_config", None) is not None:
        raise ConfigError(
            f"{folder} does not hold its language model, which cannot be quantised while it is read from here; "
            "use tove_llava.load_model"
        )
    if isinstance(given, PreTrainedConfig):
        attention = attention or given._attn_implementation_internal
        options |= _changes(given, folder)
    model = read_model(folder, dtype=None if dtype == "auto" else dtype, load_backbones=False)
    model.config.name_or_path = str(folder)
    for key, value in options.items():
        if not hasattr(model.config, key):
            raise ConfigError(f"from_pretrained has no argument {key!r} that applies to {folder}")
        setattr(model.config, key, value)
    if attention is not None:
        model.set_attn_implementation(attention)
    _put(model, device_map, **offload)
    nothing: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    return (model, nothing | {"error_msgs": []}) if info else model


def _changes(given: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """Return the plain keys in which a configuration differs from the folder's."""
    saved, wanted = read_config(folder).to_dict(), given.to_dict()
    changed = {key: value for key, value in wanted.items() if saved.get(key) != value and key not in ("dtype",)}
    nested = [key for key in changed if isinstance(wanted[key], dict)]
    if nested:
        raise ConfigError(
            f"{folder} is rebuilt from the parts that it names, which a changed {nested[0]} does not fit; load it, and "
            "change the model's own configuration"
        )
    return changed


def _put(
    model: ToveLlavaForConditionalGeneration,
    device_map: Any,
    max_memory: dict[Any, Any] | None = None,
    offload_folder: str | None = None,
    offload_buffers: bool = False,
) -> None:
    """Put a loaded model where ``device_map`` says."""
    if device_map is None:
        return
    if isinstance(device_map, (int, torch.device)) or (isinstance(device_map, str) and device_map not in _PLACES):
        model.to(device_map)
        return
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import extract_submodules_state_dict, get_balanced_memory, offload_state_dict

    if isinstance(device_map, str):
        whole = sorted(model._no_split_modules)
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=whole, low_zero=low)
        device_map = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=whole)
    on_disk = [name for name, place in device_map.items() if place == "disk"]
    if on_disk and offload_folder is not None:
        # dispatch_model itself reads whatever the folder already holds, even of another model.
        offload_state_dict(offload_folder, extract_submodules_state_dict(model.state_dict(), on_disk))
    dispatch_model(model, device_map, offload_dir=offload_folder, offload_buffers=offload_buffers)


def save_folder(
    model: ToveLlavaForConditionalGeneration,
    write: Callable[..., Any],
    place: str | os.PathLike[str],
    options: dict[str, Any],
    *,
    self_contained: bool = False,
    tags: Iterable[str] = (),
) -> None:
    """Save a model as ``save_pretrained`` does, and upload it if asked to."""
    if not options.get("is_main_process", True):
        return
    push = options.pop("push_to_hub", False)
    target = {key: options.pop(key) for key in ("repo_id", "private", "revision", *_COMMIT) if key in options}
    folder = Path(place)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give a folder to save the model in")
    folder.mkdir(parents=True, exist_ok=True)
    if getattr(model, "peft_config", None):
        save_adapted(model, folder, self_contained, tags)
    else:
        save_whole(model, folder, write, options, self_contained, tags)
    if push:
        upload(folder, target.pop("repo_id", folder.absolute().name), token=options.get("token"), **target)


def push(
    model: ToveLlavaForConditionalGeneration,
    repo_id: str,
    *,
    self_contained: bool = False,
    max_shard_size: int | str = "50GB",
    tags: Iterable[str] | None = None,
    **options: Any,
) -> Any:
    """Push a model as ``push_to_hub`` does, with the options of :func:`tove_llava.checkpoints.hub.upload`."""
    only_here = not model.config.vision_config.is_portable
    if model.origin is not None:
        only_here |= not Source.parse(model.origin.manifest.language["source"]).is_portable
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        contained = self_contained or only_here
        save_options = {"max_shard_size": max_shard_size}
        write = super(ToveLlavaForConditionalGeneration, model).save_pretrained
        save_folder(model, write, folder, save_options, self_contained=contained, tags=tags or ())
        _forget_paths(folder / "config.json")
        return upload(folder, repo_id, **options)


def _forget_paths(file: Path) -> None:
    """Remove this machine's folders from a configuration."""
    config = read_json_object(file)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("_name_or_path", None)
    write_json(file, config)
