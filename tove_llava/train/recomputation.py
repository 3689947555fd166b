"""What the language model's layers keep for the backward pass, and what they compute once more instead.

``none`` keeps everything. ``full`` keeps the input of each layer and computes the layer again. ``selective`` computes
the cheap part alone again: it keeps the outputs of attention and of the wide matrix products (norms, rotary positions,
activations, residuals and the narrow products of adapters cost little time and most of the memory). Per number kept a
matrix product saves twice its inner dimension in operations: that is the measure by which it is wide, and keeping
the products of a layer saves nearly all of its recomputation for about a third of what ``none`` keeps.

Where that is too much, as many layers as fit keep their products and the others are as under ``full``: the last ones
of the model, since the backward pass has freed what they kept when it comes to a layer that computes everything again.
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

_PRODUCTS = {
    "mm": 1,
    "addmm": 2,
    "bmm": 2,
}  # aten operator -> the argument whose second last size is the inner dimension
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
    """Of a language model whose layers are alike, a position; numbers, not bytes.

    Attributes:
        layers: how many.
        hidden: width of a layer's input, which is always kept.
        products: what ``selective`` keeps of a layer beside its input.
        whole: what ``none`` keeps of it; recomputing a layer needs about twice as much for a moment.
    """

    layers: int
    hidden: int
    products: int
    whole: int

    def selective_layers(self, positions: int, size: int, budget: int | None) -> int:
        """How many layers keep their products.

        Args:
            positions: of the batch.
            size: bytes a number.
            budget: bytes for all activations of the layers; None is no limit.
        """
        if budget is None or not positions:
            return self.layers
        free = budget - size * positions * (self.layers * self.hidden + 2 * self.whole)
        return max(0, min(self.layers, free // (size * positions * max(self.products, 1))))


def kept_products(layer: nn.Module, hidden: int) -> int:
    """Numbers a position that ``selective`` keeps of a layer: its wide products, and attention's output."""
    wide = [m.out_features for m in layer.modules() if isinstance(m, nn.Linear) and m.in_features >= hidden]
    return sum(wide) + hidden


def set_checkpointing(model: Any, kind: str, *, budget_gib: float | None = None, whole: int = 0) -> None:
    """Sets what a model's layers keep; of a model that trains CLIP, CLIP's layers keep nothing or everything.

    Args:
        model: a ToVE-LLaVA, with its adapters.
        kind: ``none``, ``full`` or ``selective``.
        budget_gib: of ``selective``, GiB that the activations of the language model's layers may take; None: no limit.
        whole: numbers a position that a layer keeps without recomputation (:class:`LayerCosts`), for the budget.

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
    """Raises ConfigError for a word that is not one of the kinds."""
    if kind not in KINDS:
        raise ConfigError(f"checkpointing must be one of {', '.join(KINDS)}, not {kind!r}")


def _call(model: PreTrainedModel, what: str, *arguments: Any) -> None:
    """Under its name in newer transformers, else its older one."""
    method = getattr(model, f"activation_checkpointing_{what}", None) or getattr(
        model, f"gradient_checkpointing_{what}"
    )
    method(*arguments)


class _Selection:
    """Gives each layer of a forward pass its pair of contexts (``context_fn`` of ``torch.utils.checkpoint``)."""

    def __init__(self, language: PreTrainedModel, budget_gib: float | None, whole: int) -> None:
        width, layers = language.config.hidden_size, getattr(language, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise ConfigError(f"selective checkpointing does not know {type(language).__name__}; use full")
        self.budget = None if budget_gib is None else int(budget_gib * GIB)
        self.costs = LayerCosts(len(layers), width, max(kept_products(layer, width) for layer in layers), whole)
        self.policy = wide_products(width)
        self.plain = 0  # layers still to come that compute everything again
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
    """The policy that keeps attention, and matrix products over an inner dimension of at least ``width``."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        space, _, name = operator.name().partition("::")
        name = name.partition(".")[0]
        place = _PRODUCTS.get(name) if space == "aten" else None
        keep = f"{space}::{name}" in _ATTENTION if place is None else args[place].shape[-2] >= width
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
