"""Names and settings of haotian-liu/LLaVA's folders, as its ``llava/model/`` has them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from tove_llava.checkpoints.parts import LlavaParts
from tove_llava.checkpoints.tensors import Tensors, split_by_prefix
from tove_llava.core.errors import CheckpointError, ConfigError

PEFT_PREFIX = "base_model.model."

# model_type -> the language model's. Published folders say "llava", newer code says "llava_llama".
_LANGUAGES = {"llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral"}
_CLASSES = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}

_CLIP, _PROJECTOR = "model.vision_tower.vision_tower.vision_model.", "model.mm_projector."
_TABLE = (
    (_CLIP, "clip", ""),
    (_PROJECTOR, "projector", ""),
    ("model.vision_tower.", "unknown", "model.vision_tower."),
    ("model.image_newline", "unknown", "model.image_newline"),
    ("model.", "language", "model."),
    ("lm_head.", "language", "lm_head."),
)
_LINEAR = {"0": "linear_1", "2": "linear_2"}  # mlp2x_gelu: linear, GELU, linear

# LLaVA-1.5's settings by key of config.json: the value if the key is absent, and the supported values.
_SETTINGS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mm_projector_type": ("linear", ("mlp2x_gelu",)),
    "mm_vision_select_feature": ("patch", ("patch",)),
    "mm_patch_merge_type": ("flat", ("flat", None)),
    "image_aspect_ratio": ("square", ("pad", "square", None)),
    "mm_use_im_start_end": (False, (False, None)),
    "mm_resampler_type": (None, (None,)),
    "s2": (False, (False, None)),
    "quantization_config": (None, (None,)),
}


def check_supported(config: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError unless it is LLaVA-1.5, CheckpointError if damaged."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _LANGUAGES:
        raise ConfigError(
            f"{folder}: a LLaVA of model_type {kind!r} cannot be taken over; known: {', '.join(_LANGUAGES)}"
        )
    for key, (absent, understood) in _SETTINGS.items():
        value = config.get(key, absent)
        if value not in understood:
            wanted = " or ".join(repr(each) for each in understood if each is not None) or "none"
            raise ConfigError(f"{folder}/config.json: {key} is {value!r}; only LLaVA-1.5's {wanted} can be taken over")
    if not isinstance(config.get("mm_vision_tower"), str) or not isinstance(config.get("mm_vision_select_layer"), int):
        raise CheckpointError(f"{folder}/config.json lacks mm_vision_tower or mm_vision_select_layer; it is damaged")
    if not isinstance(config.get("tokenizer_model_max_length") or 2048, int):
        raise CheckpointError(f"{folder}/config.json: tokenizer_model_max_length is not a number; it is damaged")


def language_config(config: dict[str, Any], folder: Path) -> PreTrainedConfig:
    """Take the language model's configuration out of a LLaVA's."""
    kind = _LANGUAGES[config["model_type"]]
    known = {field.name for field in dataclasses.fields(type(AutoConfig.for_model(kind)))}
    known -= {"architectures", "transformers_version", "dtype"}
    own = {key: value for key, value in config.items() if key in known}
    try:
        return AutoConfig.for_model(kind, **{"rope_parameters": _rope_parameters(config), **own})
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}/config.json does not describe a {kind} model: {error}") from error


def sort_tensors(tensors: Tensors, folder: Path) -> dict[str, Tensors]:
    """Sort tensors into "language", "projector" and "clip", under this package's names."""
    found = split_by_prefix(tensors, _TABLE, folder)
    if found["unknown"]:
        raise ConfigError(f"{folder}: LLaVA-1.5 has no tensor such as {sorted(found['unknown'])[0]!r}")
    projector = {}
    for name, value in found["projector"].items():
        layer, _, last = name.partition(".")
        projector[f"{_LINEAR.get(layer, layer)}.{last}"] = value
    return found | {"projector": projector}


def projector_names(projector: Tensors) -> Tensors:
    """Rename the projector's tensors to the original's names."""
    layers = {ours: theirs for theirs, ours in _LINEAR.items()}
    return {f"{_PROJECTOR}{layers[name.split('.')[0]]}.{name.split('.')[1]}": x for name, x in projector.items()}


def clip_names(clip: Tensors) -> Tensors:
    """Rename CLIP's tensors to the original's names."""
    return {_CLIP + name: value for name, value in clip.items()}


def check_writable(parts: LlavaParts) -> None:
    """Raise ConfigError for a model that the original has no class for."""
    kind = parts.language.config.model_type
    if kind not in _CLASSES:
        raise ConfigError(
            f"the original has no class for a language model of type {kind!r}, only for {' and '.join(_CLASSES)}; "
            "convert to llava-hf instead"
        )
    if parts.projector_act != "gelu" or not parts.has_bias:
        raise ConfigError("the original's projector has a GELU and biases, which this one has not")


def original_config(parts: LlavaParts, vocab_size: int, clip_name: str) -> dict[str, Any]:
    """Return ``config.json`` with the keys of transformers 4.37, the original's.

    Args:
        clip_name: a name of the hub or a folder, from which the original reads CLIP.
    """
    config = parts.language.config
    model_type, architecture = _CLASSES[config.model_type]
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(type(config))} - general - {"rope_parameters"}
    return {
        **{key: value for key, value in config.to_dict().items() if key in own},
        **_rope(config),
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "torch_dtype": parts.language.dtype,
        "mm_vision_tower": clip_name,
        "mm_hidden_size": parts.clip.config.hidden_size,
        "mm_vision_select_layer": parts.clip.layer,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": parts.image_aspect_ratio,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": parts.model_max_length,
    }


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return transformers 5's rotary settings from transformers 4's keys."""
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("type", "default")
    return {"rope_type": kind, "rope_theta": config.get("rope_theta", 10000.0), **scaling}


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Return rotary settings as two keys, as transformers 4 has them."""
    settings = dict(config.rope_parameters or {})
    theta, kind = settings.pop("rope_theta", 10000.0), settings.pop("rope_type", "default")
    settings.pop("type", None)
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else {"type": kind, **settings}}
