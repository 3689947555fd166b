"""Low-rank adapters inside a model."""

from torch import nn


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
