"""Low-rank adapters inside a model."""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tove_llava.core.errors import CheckpointError
from tove_llava.core.finite import check_finite
from tove_llava.core.safe_loading import loading

_RANKED = re.compile(r"\.lora_(embedding_)?A\b")  # tensors with one row for each rank


def add_adapters(
    model: nn.Module,
    settings: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    where: Path,
    *,
    merge: bool = False,
) -> None:
    """Put trained adapters into a model.

    Args:
        settings: fields of peft's ``LoraConfig``, as :func:`~.adapter_settings.read_adapter_settings` returns them.
        tensors: by the model's names, as peft saves them (without the adapter's name).
        where: the file or folder that they come from, for messages.
        merge: fold them into the weights.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    # Compared before anything of that size is made.
    asked = max(settings["r"], *settings.get("rank_pattern", {}).values(), 0)
    stored = max((x.shape[0] for name, x in tensors.items() if _RANKED.search(name) and x.ndim), default=0)
    if asked > stored:
        raise CheckpointError(f"{where} does not fit its settings: they ask for rank {asked}, it holds {stored}")
    check_finite(tensors.items(), where)
    with loading("the adapters", where):  # settings that contradict each other, or name no layer
        inject_adapter_in_model(LoraConfig(**settings), model)
    try:
        outcome = set_peft_model_state_dict(model, dict(tensors), adapter_name="default")
    except RuntimeError as error:  # tensors of another shape
        raise CheckpointError(f"{where} does not fit the language model: {error}") from error
    missing = [name for name in outcome.missing_keys if ".lora_" in name]
    if missing or outcome.unexpected_keys:
        raise CheckpointError(
            f"{where} does not fit the language model: missing {missing[:2]}, unexpected {outcome.unexpected_keys[:2]}"
        )
    if merge:
        try:
            fold_adapters(model)
        except (ValueError, RuntimeError) as error:  # an infinite sum; a bias that the layer has no place for
            raise CheckpointError(f"{where} cannot be merged: {error}") from error


def adapter_layers(module: nn.Module) -> dict[str, Any]:
    """Return the layers inside a module that have adapters, by name."""
    if "peft" not in sys.modules:
        return {}  # there are none
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def adapter_parameters(module: nn.Module, bias: str) -> Iterator[nn.Parameter]:
    """Yield the parameters that adapters train; ``bias`` as in peft's ``LoraConfig``."""
    for layer in adapter_layers(module).values():
        for name in layer.adapter_layer_names:
            yield from getattr(layer, name).parameters()
        base_bias = getattr(layer.get_base_layer(), "bias", None)
        if bias == "lora_only" and base_bias is not None:
            yield base_bias
    if bias == "all":
        yield from (p for name, p in module.named_parameters() if name.rpartition(".")[2] == "bias")


@contextmanager
def inputs_left_to_autocast(model: nn.Module) -> Iterator[None]:
    """Let adapters take their inputs uncast under autocast.

    peft casts them to the adapters' float32, and autocast casts that back for the product: two passes over every
    activation, and one kept for the backward pass, that change nothing.
    """
    if not adapter_layers(model):
        yield
        return
    from peft.helpers import disable_input_dtype_casting

    with disable_input_dtype_casting(model):
        yield


def fold_adapters(module: nn.Module) -> None:
    """Add every LoRA layer's product to its base layer's weight."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config
    module._hf_peft_config_loaded = False
