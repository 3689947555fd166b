"""Read the settings of LoRA adapters, and accept only those whose effect is reproduced.

:data:`HONOURED`, :data:`REFUSED` and :data:`WITHOUT_EFFECT` name every field of peft's ``LoraConfig``.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object

_MAX_RANK = 2**16
# The pattern that this package writes: the named layers of its language model.
_OWN_PATTERN = re.compile(r"model\\\.language_model\\\.\(\?:\.\*\\\.\)\?\(\?:\w+(?:\|\w+)*\)")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def _is_index(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MAX_RANK


def _is_rank(value: Any) -> bool:
    return _is_index(value, least=1)


def _is_scale(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)*", value) is not None


def _all(check: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_RANK and all(map(check, value))


def _by_name(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    # peft reads a name as a regular expression; of a plain one it is the end of a layer's name.
    return lambda value: isinstance(value, dict) and _all(_is_name, list(value)) and _all(check, list(value.values()))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_BOOL = (_is_bool, "true or false")

#: the fields that say how adapters compute, each with its check and its values in words
HONOURED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, f"a whole number from 1 to {_MAX_RANK}"),
    "lora_alpha": (_is_scale, "a number above 0"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "fan_in_fan_out": _BOOL,
    "use_rslora": _BOOL,
    "use_dora": _BOOL,
    "lora_bias": _BOOL,
    # The others of peft's change the language model's own weights.
    "init_lora_weights": (lambda value: _is_bool(value) or value in ("gaussian", "orthogonal", "eva"),
                          "true, false, gaussian, orthogonal or eva: merge others with peft first"),
    "target_modules": (lambda value: _all(_is_name, value) or _is_own_pattern(value), "a list of names"),
    "exclude_modules": (lambda value: _all(_is_name, value), "a list of names"),
    "layers_to_transform": (lambda value: _is_index(value) or _all(_is_index, value), "a list of layers"),
    "layers_pattern": (lambda value: _is_name(value) or _all(_is_name, value), "a list of names"),
    "rank_pattern": (_by_name(_is_rank), "ranks by the names of layers"),
    "alpha_pattern": (_by_name(_is_scale), "numbers above 0 by the names of layers"),
}  # fmt: skip
_NULLABLE = ("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
_NEEDED = ("r", "lora_alpha", "target_modules")

#: the fields that make adapters more than LoRA, or change the weights under them
REFUSED = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens",
    "use_qalora", "megatron_config", "velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config",
)  # fmt: skip

#: the fields about where adapters come from, and how refused or overwritten values began
WITHOUT_EFFECT = (
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core",
    "runtime_config", "ensure_weight_tying",
)  # fmt: skip

# Of the honoured fields, those that plain LoRA in every format has; the others only at these values.
_PLAIN = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "fan_in_fan_out")
_NOT_PLAIN = {"bias": "none", "use_dora": False, "lora_bias": False} | dict.fromkeys(_NULLABLE)


def read_adapter_settings(file: Path, advice: str, *, plain: bool = False) -> dict[str, Any]:
    """Return the fields of ``adapter_config.json`` that peft's ``LoraConfig`` is to be made of.

    Args:
        advice: what to do about adapters that are refused.
        plain: accept only what every format has, and return only that.

    Raises:
        CheckpointError: a value is damaged.
        ConfigError: the adapters are no LoRA, or a kind of it that is not reproduced.
    """
    found = read_json_object(file)
    if found.get("peft_type") != "LORA":
        raise _refused(file, "peft_type", found.get("peft_type"), advice)
    kept: dict[str, Any] = {}
    for key, value in found.items():
        if key in HONOURED:
            if value is None and key in _NULLABLE:
                continue
            check, wanted = HONOURED[key]
            if key == "init_lora_weights" and isinstance(value, str) and not check(value):
                raise _refused(file, key, value, advice)
            if not check(value):
                raise CheckpointError(f"{file}: {key} is {_short(value)}, not {wanted}")
            kept[key] = value
        elif key not in WITHOUT_EFFECT and value not in (None, False, {}):
            raise _refused(file, key, value, advice)
    lacking = [key for key in _NEEDED if key not in kept]
    if lacking:
        raise CheckpointError(f"{file} is damaged: it lacks {lacking[0]!r}")
    if plain:
        odd = next((key for key, usual in _NOT_PLAIN.items() if kept.get(key) not in (usual, None, {}, [])), None)
        if odd is not None:
            raise _refused(file, odd, kept[odd], advice)
        kept = {key: value for key, value in kept.items() if key in _PLAIN}
    elif isinstance(kept.get("init_lora_weights"), str):
        kept["init_lora_weights"] = True  # the values are overwritten
    return kept | {"task_type": "CAUSAL_LM"}


def _is_own_pattern(value: Any) -> bool:
    return isinstance(value, str) and _OWN_PATTERN.fullmatch(value) is not None


def _refused(file: Path, key: str, value: Any, advice: str) -> ConfigError:
    return ConfigError(
        f"{file}: only plain LoRA can be taken over, not {key} {_short(value)}" + (advice and "; " + advice)
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
