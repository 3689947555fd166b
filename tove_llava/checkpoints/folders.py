"""``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` over this package's checkpoint folders.

:class:`~tove_llava.llava.modeling.ToveLlavaForConditionalGeneration` hands these over to here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from tove_llava.checkpoints.card import read_scores, write_card
from tove_llava.checkpoints.checkpoint import (
    read_config,
    read_model,
    save_checkpoint,
    trained_names,
)
from tove_llava.checkpoints.hub import download, upload
from tove_llava.checkpoints.manifest import ADAPTER, MANIFEST, TRAINED, Manifest, write_manifest
from tove_llava.checkpoints.origin import Origin, language_digest
from tove_llava.checkpoints.weight_fingerprints import exact_fingerprint
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.sources import Source
from tove_llava.llava.adapters import adapter_layers, adapter_parameters
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration
from tove_llava.tower import ToveVisionModel

# Arguments of from_pretrained that are settled once the folder is found.
_WHERE = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder", "proxies")
# And those that mean nothing where load_model reads it.
_UNUSED = (
    "adapter_kwargs", "trust_remote_code", "_from_auto", "_from_pipeline", "use_safetensors", "low_cpu_mem_usage",
    "weights_only", "_commit_hash", "local_files_only",
)  # fmt: skip
_COMMIT = ("create_pr", "commit_message", "commit_description")
_PLACES = ("auto", "balanced", "balanced_low_0", "sequential")


# -- opening ----------------------------------------------------------------------------------------------------------


def open_folder(
    read: Callable[..., Any], place: str | os.PathLike[str], options: dict[str, Any]
) -> tuple[Any, str | os.PathLike[str]]:
    """``from_pretrained`` without the backbones.

    Args:
        read: transformers' own ``from_pretrained``.
        place: a folder, or the name of a repository.
        options: its keyword arguments.

    Returns:
        what ``from_pretrained`` returns, and the folder that sources are relative to.

    Raises:
        CheckpointError, ConfigError: the folder is damaged, or an argument does not apply to it.
    """
    folder = (
        Path(place, options.get("subfolder") or "") if os.path.isdir(place) else download(os.fspath(place), options)
    )
    if folder is None:
        return read(place, **options), place  # which says why there is none
    manifest = Manifest.read(folder) if (folder / MANIFEST).is_file() else None
    if manifest is None or manifest.kind == "full":
        loaded = read(str(folder), **{k: v for k, v in options.items() if k not in _WHERE})
    else:
        loaded = _read_parts(folder, {k: v for k, v in options.items() if k not in (*_WHERE, *_UNUSED)})
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if manifest is not None:
        model.origin = Origin.of(model, folder, manifest)
    return loaded, model.config.name_or_path or folder  # of adapters on their own, the model's that they are for


def _read_parts(folder: Path, options: dict[str, Any]) -> Any:
    """A model whose language model comes from elsewhere: first as it was trained, then what else was asked for."""
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
    """The plain keys in which a configuration differs from the folder's."""
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
    """Puts a loaded model where ``device_map`` says."""
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
        # By itself dispatch_model takes whatever the folder holds already, of another model too.
        offload_state_dict(offload_folder, extract_submodules_state_dict(model.state_dict(), on_disk))
    dispatch_model(model, device_map, offload_dir=offload_folder, offload_buffers=offload_buffers)


# -- saving -----------------------------------------------------------------------------------------------------------


def save_folder(
    model: ToveLlavaForConditionalGeneration,
    write: Callable[..., Any],
    place: str | os.PathLike[str],
    options: dict[str, Any],
    *,
    self_contained: bool = False,
    tags: Iterable[str] = (),
) -> None:
    """``save_pretrained``.

    Args:
        write: transformers' own.
        options: its keyword arguments.
        self_contained: see there.
        tags: for the card.

    Raises:
        CheckpointError: the folder would not be this model again.
    """
    if not options.get("is_main_process", True):
        return
    push = options.pop("push_to_hub", False)
    target = {key: options.pop(key) for key in ("repo_id", "private", "revision", *_COMMIT) if key in options}
    folder = Path(place)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give a folder to save the model in")
    folder.mkdir(parents=True, exist_ok=True)
    if getattr(model, "peft_config", None):
        _save_adapted(model, folder, self_contained, tags)
    else:
        _save_whole(model, write, folder, options, self_contained, tags)
    if push:
        upload(folder, target.pop("repo_id", folder.absolute().name), token=options.get("token"), **target)


def _save_whole(
    model: ToveLlavaForConditionalGeneration,
    write: Callable[..., Any],
    folder: Path,
    options: dict[str, Any],
    self_contained: bool,
    tags: Iterable[str],
) -> None:
    _refuse_remains(folder, (TRAINED, ADAPTER, "adapter_config.json"))
    rounded = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if rounded:
        raise CheckpointError(
            f"the language model is held in 4 or 8 bits ({rounded[0]}), which a saved model is not; load it without "
            "quantisation and save that"
        )
    (folder / MANIFEST).unlink(missing_ok=True)
    state = dict(options.pop("state_dict", None) or model.state_dict())
    prefix = next(name for name, module in model.named_modules() if module is model.tower) + "."
    own = model.config.vision_config
    vision, state = model.tower.save_parts(folder, state, prefix, self_contained)
    if not own.lies_in_checkpoint or vision.lies_in_checkpoint:  # else it is save_backbones', put there by the caller
        model.config.vision_config = vision
    try:
        write(folder, state_dict=state, **options)
    finally:
        model.config.vision_config = own
    if model.origin is None:
        write_card(folder, model.config.vision_config, tags=tags)
        return
    old = model.origin.manifest
    weights = _on_cpu(dict(model.named_parameters()))
    manifest = Manifest(
        kind="full",
        stage=old.stage,
        preset=old.preset,
        template=old.template,
        image_aspect_ratio=old.image_aspect_ratio,
        model_max_length=old.model_max_length,
        language=old.language | {"dtype": str(model.dtype).removeprefix("torch.")},
        history=old.history,
        fingerprint=exact_fingerprint(weights) if weights else "",
    )
    write_card(folder, model.config.vision_config, manifest, scores=_scores(model, weights), tags=tags)
    if self_contained and not Source.parse(manifest.language["source"]).is_portable:
        manifest.language["source"] = f"hf:./{Path(old.language['source']).name}"  # no path of this machine
    write_manifest(folder, manifest)


def _save_adapted(
    model: ToveLlavaForConditionalGeneration, folder: Path, self_contained: bool, tags: Iterable[str]
) -> None:
    _refuse_remains(folder, [path.name for path in folder.glob("model*.safetensors")])
    origin = _origin_of_adapted(model)
    config = model.peft_config["default"]
    adapters = {id(p) for p in adapter_parameters(model.model.language_model, config.bias)}
    names = trained_names(model) | {name for name, p in model.named_parameters() if id(p) in adapters}
    trained = _on_cpu({name: p for name, p in model.named_parameters() if name in names})
    dtype = str(model.dtype).removeprefix("torch.")
    same = dtype == origin.manifest.language["dtype"]
    manifest = dataclasses.replace(
        origin.manifest,
        kind="lora",
        language=origin.manifest.language | {"dtype": dtype},
        language_fingerprint=origin.manifest.language_fingerprint if same else "",
    )
    by_value = self_contained or origin.holds_language
    scores = _scores(model, trained)
    save_checkpoint(folder, model, None, manifest, trained, self_contained=by_value, scores=scores, tags=tags)


def _origin_of_adapted(model: ToveLlavaForConditionalGeneration) -> Origin:
    """Where the language model under the adapters can be read again.

    Raises:
        CheckpointError: nowhere as it is now, or the adapters are not only on it.
    """
    fold = "Fold them into it (tove_llava.llava.adapters.fold_adapters(model)) and save the whole model"
    origin = model.origin
    if not isinstance(model.tower, ToveVisionModel):
        raise CheckpointError("a model that is being merged cannot be saved; let the run end, which saves it")
    if origin is None or origin.manifest.kind == "full":
        raise CheckpointError(f"the language model under the adapters is in no source that could be named. {fold}")
    if list(model.peft_config) != ["default"]:
        raise CheckpointError(
            f"one set of adapters can be saved, named 'default', not {list(model.peft_config)}. {fold}"
        )
    language = {id(layer) for layer in adapter_layers(model.model.language_model).values()}
    astray = [name for name, layer in adapter_layers(model).items() if id(layer) not in language]
    if astray:
        raise CheckpointError(f"adapters can be saved on the language model alone, not on {astray[0]}. {fold}")
    if not origin.language or language_digest(model) != origin.language:
        raise CheckpointError(
            "the language model under the adapters is not what it was when it was loaded: its weights were changed, "
            f"cast to another dtype, or are offloaded. {fold}, or load it in that dtype (load_model's dtype) first"
        )
    return origin


def _refuse_remains(folder: Path, names: Iterable[str]) -> None:
    present = [name for name in names if (folder / name).exists()]
    if present:
        raise CheckpointError(
            f"{folder} holds another kind of checkpoint ({present[0]}), which would be mixed with this; choose another "
            "folder"
        )


def _on_cpu(parameters: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copies on the CPU; none at all where some are offloaded."""
    if any(p.is_meta for p in parameters.values()):
        return {}
    return {name: p.detach().to("cpu").contiguous() for name, p in parameters.items()}


def _scores(model: ToveLlavaForConditionalGeneration, weights: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """The evaluation beside the checkpoint that a model came from, if its weights are still those."""
    origin = model.origin
    report = read_scores(origin.folder)
    if report is None or not weights or not origin.manifest.fingerprint:
        return None
    if origin.manifest.kind == "trained":
        if language_digest(model) != origin.language:
            return None
        weights = {name: weights[name] for name in trained_names(model)}
    return report if exact_fingerprint(weights) == origin.manifest.fingerprint else None


# -- the hub ----------------------------------------------------------------------------------------------------------


def push(
    model: ToveLlavaForConditionalGeneration,
    repo_id: str,
    *,
    self_contained: bool = False,
    max_shard_size: int | str = "50GB",
    tags: Iterable[str] | None = None,
    **options: Any,
) -> Any:
    """``push_to_hub``; ``options`` are those of :func:`tove_llava.checkpoints.hub.upload`."""
    here_alone = not model.config.vision_config.is_portable
    if model.origin is not None:
        here_alone |= not Source.parse(model.origin.manifest.language["source"]).is_portable
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        contained = self_contained or here_alone
        save_options = {"max_shard_size": max_shard_size}
        write = super(ToveLlavaForConditionalGeneration, model).save_pretrained
        save_folder(model, write, folder, save_options, self_contained=contained, tags=tags or ())
        _forget_paths(folder / "config.json")
        return upload(folder, repo_id, **options)


def _forget_paths(file: Path) -> None:
    """Takes the folders of this machine that parts were read from out of a configuration."""
    config = read_json_object(file)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
