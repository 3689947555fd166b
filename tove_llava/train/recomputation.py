"""Choose the activations that layers keep, and those they recompute.

``none`` keeps everything. ``full`` keeps the input of each layer and computes the layer again. ``selective`` keeps the
outputs of attention and of wide matrix products, and computes the rest again: norms, rotary positions, activations,
residuals and the narrow products of adapters, which cost little time and most of the memory. A product is wide by its
inner dimension, because for each number that is kept it saves twice that many operations. Keeping a layer's wide
products saves nearly all of its recomputation, for about a third of the memory of ``none``.

With a budget, the layers that fit keep their products and the others behave as under ``full``. The last layers keep
theirs, since the backward pass has freed these when it comes to a layer that computes everything again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from tove_llava.core.errors import ConfigError
from tove_llava.core.text import GIB

NONE, FULL, SELECTIVE = KINDS = ("none", "full", "selective")
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

# aten operator -> the argument whose second last size is the inner dimension
_PRODUCTS = {"mm": 1, "addmm": 2, "bmm": 2}
_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
)


_HOOKS: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()  # language models under selective checkpointing


@dataclass(frozen=True)
class LayerCosts:
    """Values per token in one decoder layer."""

    layers: int
    hidden: int  # width of a layer's input, which is always kept
    products: int  # kept by selective, without the input
    whole: int  # kept by none; recomputing a layer needs about twice as much for a moment

    def selective_layers(self, tokens: int, size: int, budget: int | None) -> int:
        """Return how many layers keep their products.

        Args:
            tokens: of the batch.
            size: bytes a value.
            budget: bytes for all activations of the layers; None is no limit.
        """
        if budget is None or not tokens:
            return self.layers
        free = budget - size * tokens * (self.layers * self.hidden + 2 * self.whole)
        return max(0, min(self.layers, free // (size * tokens * max(self.products, 1))))


def kept_products(layer: nn.Module, hidden: int) -> int:
    """Count the values per token of a layer's wide products and attention."""
    wide = [m.out_features for m in layer.modules() if isinstance(m, nn.Linear) and m.in_features >= hidden]
    return sum(wide) + hidden


def set_checkpointing(model: Any, kind: str, *, budget_gib: float | None = None, whole: int = 0) -> None:
    """Set the activations that a model's layers keep.

    Layers of a CLIP that trains know no ``selective``: there it means ``full``.

    Args:
        model: a ToVE-LLaVA, with its adapters.
        kind: ``none``, ``full`` or ``selective``.
        budget_gib: of ``selective``, GiB for the activations of the language model's layers; None: no limit.
        whole: see :class:`LayerCosts`; needed for the budget.

    Raises:
        ConfigError: no such kind, or a language model without a list of layers.
    """
    check_kind(kind)
    language = model.model.language_model
    if language in _HOOKS:
        _HOOKS.pop(language).remove()
    if kind == NONE:
        _call(model, "disable")
        return
    _call(model, "enable")
    if kind == SELECTIVE:
        _call(language, "enable", {"use_reentrant": False, "context_fn": _Selection(language, budget_gib, whole)})


def check_kind(kind: str) -> None:
    """Refuse an unknown kind with a ConfigError."""
    if kind not in KINDS:
        raise ConfigError(f"checkpointing must be one of {', '.join(KINDS)}, not {kind!r}")


def _call(model: PreTrainedModel, what: str, *arguments: Any) -> None:
    newer = getattr(model, f"activation_checkpointing_{what}", None)  # its name in newer transformers
    (newer or getattr(model, f"gradient_checkpointing_{what}"))(*arguments)


class _Selection:
    """A ``context_fn`` of ``torch.utils.checkpoint``, which gives each layer its pair of contexts."""

    def __init__(self, language: PreTrainedModel, budget_gib: float | None, whole: int) -> None:
        width, layers = language.config.hidden_size, getattr(language, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise ConfigError(f"selective checkpointing does not know {type(language).__name__}; use full")
        self.budget = None if budget_gib is None else int(budget_gib * GIB)
        self.costs = LayerCosts(len(layers), width, max(kept_products(layer, width) for layer in layers), whole)
        self.policy = wide_products(width)
        self.plain = 0  # layers to come that compute everything again
        _HOOKS[language] = language.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, language: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = kwargs["inputs_embeds"]  # [B,L,D]: LLaVA always gives embeddings
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        chosen = self.costs.selective_layers(inputs.shape[:2].numel(), dtype.itemsize, self.budget)
        self.plain = self.costs.layers - chosen

    def __call__(self) -> Contexts:
        if self.plain:
            self.plain -= 1
            return nullcontext(), nullcontext()
        return create_selective_checkpoint_contexts(self.policy)


def wide_products(width: int) -> Callable[..., CheckpointPolicy]:
    """Make a policy that keeps attention and products as wide as ``width``."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        space, _, name = operator.name().partition("::")
        name = name.partition(".")[0]
        argument = _PRODUCTS.get(name) if space == "aten" else None
        keep = f"{space}::{name}" in _ATTENTION if argument is None else args[argument].shape[-2] >= width
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
