"""The language model's linear layers in 4 or 8 bits, by bitsandbytes.

Only the given module changes: tower, projector and head stay, whatever their layers are called. Quantised weights are
frozen; adapters on them train.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tove_llava.core.errors import ConfigError
from tove_llava.presets import QuantizationPreset

INT8_THRESHOLD = 6.0  # activations beyond it are multiplied in 16 bits (Dettmers et al. 2022, and LLaVA's setting)


def quantize(
    model: nn.Module,
    settings: QuantizationPreset,
    *,
    compute_dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> None:
    """Replace the linear layers of a LLaVA's language model by quantised ones.

    Args:
        model: a ``LlavaForConditionalGeneration``; its adapters are to be added afterwards.
        compute_dtype: of the matrix products.
        device: where the model will run; weights are quantised there, one layer at a time, and stay there. The CPU by
            default.
    """
    language = model.model.language_model
    for name, layer in _linear(language):
        parent, _, attribute = name.rpartition(".")
        setattr(language.get_submodule(parent), attribute, _quantized(layer, settings, compute_dtype, device))
    setattr(model, f"is_loaded_in_{settings.bits}bit", True)  # peft chooses the kind of adapter by this


def round_weights(model: nn.Module, settings: QuantizationPreset, *, device: torch.device | str | None = None) -> None:
    """Give linear layers the values that quantisation leaves, in their dtype.

    Args:
        device: where to compute.
    """
    for _, layer in _linear(model.model.language_model):
        quantized = _quantized(layer, settings, layer.weight.dtype, device)
        layer.weight.data.copy_(_values(quantized.weight))


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Set the dtype in which 4-bit layers multiply; autocast skips them."""
    if loaded_bits(model) == 4:
        bnb = _bitsandbytes()
        for layer in model.modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                layer.compute_dtype = dtype


def loaded_bits(model: nn.Module) -> int:
    """Return the bits (4 or 8) set by :func:`quantize`, else 16."""
    return next((bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), 16)


def parameter_count(parameter: torch.Tensor) -> int:
    """Count a parameter's weights; a byte stores two of 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def recorded(settings: QuantizationPreset | None) -> dict[str, Any] | None:
    """Return plain data for a manifest; ``QuantizationPreset(**data)`` reads it."""
    return None if settings is None else dataclasses.asdict(settings)


def _linear(language: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in list(language.named_modules()):
        if type(layer) is nn.Linear:
            yield name, layer


def _quantized(
    layer: nn.Linear, settings: QuantizationPreset, compute_dtype: torch.dtype, device: torch.device | str | None
) -> Any:
    bnb = _bitsandbytes()
    device = torch.device(device or "cpu")
    keys: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta"}
    weight = layer.weight.detach()
    if settings.bits == 4:
        kind = {"compress_statistics": settings.double_quant, "quant_type": settings.quant_type}
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=compute_dtype, **kind, **keys)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=new, **kind).to(device)
        # On CPUs with AVX512-BF16 the first product in eval mode would repack the weights for another kernel, which
        # rounds to bfloat16 and has no gradient for later training.
        new.support_avx512bf16_for_cpu = False
    else:
        kind = {"has_fp16_weights": False, "threshold": INT8_THRESHOLD}
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, **kind, **keys)
        new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
    return new.train(layer.training)


def _values(weight: Any) -> torch.Tensor:
    """Return the values that a quantised weight stands for."""
    functional = _bitsandbytes().functional
    if getattr(weight, "quant_state", None) is not None:
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    return functional.int8_vectorwise_dequant(weight.data, weight.SCB)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            "4 and 8 bits need bitsandbytes, which is not installed: pip install bitsandbytes, or use 16 bits"
        ) from error
    return bitsandbytes
