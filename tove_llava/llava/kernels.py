"""Fused Triton kernels (liger-kernel's) for the language model, on CUDA.

Norms, rotary positions and the MLP's activation take one pass over the memory instead of several. The loss is not
liger's: :mod:`tove_llava.llava.loss` has no logits to save where nothing is learned from.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tove_llava.core.errors import ConfigError

# Architectures with tests of equality; each has a rotation of this name in its module.
KNOWN = ("llama", "mistral", "qwen2", "qwen3")
_ROTATION = "apply_rotary_pos_emb"


def check_kernels(device: torch.device) -> None:
    """Raise ConfigError if CUDA or liger-kernel is missing."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton on the CPU, far slower than torch: for tests
    if device.type != "cuda" and not interpreted:
        raise ConfigError(f"fused kernels need a CUDA GPU, and this runs on {device.type}; leave --fused_kernels out")
    _liger()


@contextmanager
def fused_kernels(language_model: PreTrainedModel) -> Iterator[None]:
    """Let a language model compute with fused kernels.

    Parameters keep their names; adapters, quantised layers and checkpointing work as before. Meanwhile other models of
    the same architecture share the rotation, so they have to be on the GPU too.
    """
    check_kernels(language_model.device)
    config = language_model.config
    if config.model_type not in KNOWN:
        raise ConfigError(f"fused kernels know {', '.join(KNOWN)}, and not {config.model_type}; leave them out")
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"fused kernels know the activation silu, and not {config.hidden_act}; leave them out")
    source = sys.modules[type(language_model).__module__]
    functions = dict(vars(source))
    attributes = {module: set(vars(module)) for module in language_model.modules()}
    try:
        _liger()(
            language_model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
        )
        _rotate_copies(source)
        yield
    finally:
        vars(source).update(functions)
        for module, before in attributes.items():
            for name in set(vars(module)) - before:
                vars(module).pop(name)


def _rotate_copies(source: Any) -> None:
    # liger rotates in place, unseen by torch, but selective checkpointing keeps these tensors.
    rotate = getattr(source, _ROTATION)

    def rotated(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return rotate(query.clone(), key.clone(), *args, **kwargs)

    setattr(source, _ROTATION, rotated)


def _liger() -> Any:
    try:
        return importlib.import_module("liger_kernel.transformers")._apply_liger_kernel_to_instance
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"fused kernels need liger-kernel: pip install 'tove-llava[kernels]' ({error})") from error
