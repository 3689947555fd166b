"""The token-aware gate: each vision token's weight for each expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tove_llava.tower.balance_loss import expected_load
from tove_llava.tower.tower_config import GATES, ToveVisionConfig

G = TypeVar("G", bound="type[Gate]")


def register_gate(name: str) -> Callable[[G], G]:
    """Return a class decorator that registers a :class:`Gate` under ``name``.

    ``fusion_options: {gate: NAME}`` in a preset chooses it, in the fusions that have a gate.

    Args:
        name: not yet a gate's.

    Raises:
        ConfigError: another gate has that name.

    Example:
        >>> from tove_llava.tower.gate import Gate, GateOutput
        >>> @tove_llava.register_gate("even")
        ... class Even(Gate):
        ...     def forward(self, tokens, allowed, eps=None):
        ...         selected = allowed[:, None].expand(-1, tokens.shape[1], -1)  # [B,N,S]
        ...         weights = selected / selected.sum(-1, keepdim=True).clamp(min=1)
        ...         return GateOutput(weights, torch.zeros_like(weights), selected, None)
        >>> tower = tove_llava.load_tower("tiny", overrides=["vision.fusion_options.gate=even"])
        >>> tower(image).routing[0, 0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return GATES.register(name)


class GateOutput(NamedTuple):
    """The gate's decision, for K experts and a null slot, if any.

    A tuple, because DeepSpeed looks for tensors in tuples. S is the number of columns; the null slot is last.

    Args:
        weights: ``[B,N,S]`` float32; rows sum to 1, or to 0 where no column is allowed (or to the probability of the
            selected columns, for a gate with ``keep_probability``).
        logits: ``[B,N,S]`` float32, before noise and masks.
        selected: ``[B,N,S]`` bool: allowed, and among the top k.
        load: ``[B,N,S]`` float32, probability of being chosen if the column's noise is redrawn; None without noise.
    """

    weights: Tensor
    logits: Tensor
    selected: Tensor
    load: Tensor | None


class Float32Linear(nn.Module):
    """A bias-free linear map in float32, whatever its weights' dtype.

    Autocast does not change that. It is no ``nn.Linear``, so sweeps for LoRA targets or quantisable layers skip it. The
    weight is used in this module's own forward, where ZeRO-3 gathers it.
    """

    def __init__(self, in_features: int, out_features: int, *, std: float) -> None:
        super().__init__()
        self.std = std  # of the initial weights; 0 starts at zero
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            # One product per column: the last bits of a matrix product depend on its number of columns, and removing a
            # column from a gate must not change the others. Not F.linear: under ZeRO-3 DeepSpeed replaces it by one
            # whose backward pass takes matrices only.
            return torch.stack([x @ column for column in self.weight.float()], dim=-1)


class Float32LayerNorm(nn.Module):
    """Layer normalisation in float32, whatever the dtype of weights, inputs and autocast."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)


class Gate(nn.Module, ABC):
    """Base class of gates: each token's weight for each column, K experts and the null slot, if any.

    Each layer with parameters sets its initial values in ``reset_parameters``.

    Args:
        width: d, width of a token.
        slots: S, number of columns.

    Attributes:
        top_k: columns that a token chooses; None for all.
        noise: what scales the noise in training; None for a gate without noise.
        rows: parameters with one row per column, which are cut when experts are removed for good.
    """

    rows: ClassVar[tuple[str, ...]] = ()

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.top_k: int | None = None
        self.noise: nn.Module | None = None

    @classmethod
    def from_config(cls, config: ToveVisionConfig, slots: int) -> Gate:
        """Build the gate of a tower."""
        return cls(config.clip_width, slots)

    @abstractmethod
    def forward(self, tokens: Tensor, allowed: Tensor, eps: Tensor | None = None) -> GateOutput:
        """Compute each token's weights.

        Args:
            tokens: ``[B,N,d]``.
            allowed: ``[B,S]`` bool, usable columns of an image; the others' weights must be 0.
            eps: ``[B,N,S]`` standard normal noise, or None for a gate without noise.
        """


@register_gate("token")
class TokenGate(Gate):
    """``G = softmax(W_g LN(T) + softplus(W_n LN(T)) * eps)`` over allowed columns.

    Shazeer et al. 2017, section 2.1, all in float32: a gate decides by small differences, and a recomputation from the
    same T and eps has to give the same G under any autocast.

    Args:
        width: d, width of a token.
        slots: S, number of columns.
        noisy: with a trainable noise scale.
        top_k: keep the k largest logits of a token before the softmax; None keeps all.
        keep_probability: keep the top k of a softmax over all allowed columns, without making them sum to 1.
    """

    rows = ("score.weight", "noise.weight")

    def __init__(
        self, width: int, slots: int, *, noisy: bool, top_k: int | None, keep_probability: bool = False
    ) -> None:
        super().__init__(width, slots)
        self.top_k = top_k
        self.keep_probability = keep_probability
        self.norm = Float32LayerNorm(width)
        # Nearly even weights at the start. Shazeer et al. use zeros, but ties without noise would send every token to
        # the same k experts.
        self.score = Float32Linear(width, slots, std=0.01 * width**-0.5)
        self.noise = Float32Linear(width, slots, std=0.0) if noisy else None

    @classmethod
    def from_config(cls, config: ToveVisionConfig, slots: int) -> TokenGate:
        return cls(config.clip_width, slots, noisy=config.noisy_gating, top_k=config.top_k)

    def forward(self, tokens: Tensor, allowed: Tensor, eps: Tensor | None = None) -> GateOutput:
        allowed = allowed[:, None, :].expand(-1, tokens.shape[1], -1)  # [B,N,S]
        normed = self.norm(tokens)
        logits = self.score(normed)
        # In training the noise scale is computed even without noise: every step touches the same parameters.
        std = F.softplus(self.noise(normed)) if self.noise is not None and (self.training or eps is not None) else None
        noisy, load = logits, None
        if std is not None and eps is not None:
            noisy = logits + std * eps.to(logits.dtype)
            load = expected_load(logits, noisy, std, allowed, k=self.top_k or 1)

        selected = allowed
        if self.top_k is not None and self.top_k < self.slots:
            index = noisy.masked_fill(~allowed, float("-inf")).topk(self.top_k, dim=-1).indices
            selected = torch.zeros_like(allowed).scatter(-1, index, True) & allowed
        weights = _masked_softmax(noisy, allowed if self.keep_probability else selected)
        if self.keep_probability:
            weights = weights.masked_fill(~selected, 0.0)
        return GateOutput(weights=weights, logits=logits, selected=selected, load=load)


def _masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute the softmax over the True columns, and 0 elsewhere."""
    empty = ~mask.any(dim=-1, keepdim=True)
    weights = logits.masked_fill(~mask, float("-inf")).masked_fill(empty, 0.0).softmax(dim=-1)
    return weights.masked_fill(~mask, 0.0)
