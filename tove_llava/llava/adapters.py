"""Low-rank adapters inside a model."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def adapter_layers(module: nn.Module) -> dict[str, Any]:
    """The layers inside a module that have adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def adapter_parameters(module: nn.Module, bias: str) -> Iterator[nn.Parameter]:
    """What the adapters inside a module train; ``bias`` as in peft's ``LoraConfig``."""
    for layer in adapter_layers(module).values():
        for name in layer.adapter_layer_names:
            yield from getattr(layer, name).parameters()
        base_bias = getattr(layer.get_base_layer(), "bias", None)
        if bias == "lora_only" and base_bias is not None:
            yield base_bias
    if bias == "all":
        yield from (p for name, p in module.named_parameters() if name.rpartition(".")[2] == "bias")


def fold_adapters(module: nn.Module) -> None:
    """Adds every LoRA layer's product to its base layer and puts that back in its place."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, layer.get_base_layer())
    for attribute in ("peft_config",):
        if hasattr(module, attribute):
            delattr(module, attribute)
    module._hf_peft_config_loaded = False
