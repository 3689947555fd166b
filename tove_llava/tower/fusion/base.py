"""The contract of a fusion: everything trainable of a tower is in one such module, and nothing else is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from tove_llava.core.errors import ConfigError
from tove_llava.tower.balance import BalanceStatistics
from tove_llava.tower.configuration import ToveVisionConfig


class GateInputs(NamedTuple):
    """All that is needed to compute a gate again: the accumulation window's balance loss does so.

    Args:
        tokens: ``[B,N,d]`` CLIP's tokens, without graph.
        noise: ``[B,N,S]`` float32 standard normal, or None when the gate ran without noise.
        usable: ``[B,K]`` bool, False where an expert was dropped for an image; None when none was.
    """

    tokens: torch.Tensor
    noise: torch.Tensor | None = None
    usable: torch.Tensor | None = None


class FusionOutput(NamedTuple):
    """
    Args:
        tokens: ``[B,M,w]``, in the dtype of CLIP's tokens; ``[B,N,d]`` for a fusion that keeps their shape.
        routing: ``[B,N,S]`` float32 gate weights, or None for a fusion without a gate.
        gate_logits: ``[B,N,S]`` float32 before noise and masks, or None.
        gate_inputs: what :meth:`Fusion.balance_statistics` takes, or None for a fusion without a gate.
    """

    tokens: torch.Tensor
    routing: torch.Tensor | None = None
    gate_logits: torch.Tensor | None = None
    gate_inputs: GateInputs | None = None


class Fusion(nn.Module, ABC):
    """Base class; a subclass registers itself with ``@FUSIONS.register(name)`` and takes the tower's configuration.

    ``config.detached_experts`` may change at any time; a fusion reads it at every call. Layers own their initial
    values: each one with parameters has a ``reset_parameters``, which uses ``torch.nn.init``.
    """

    uses_experts: ClassVar[bool] = True
    fused: bool = False  # use kernels that do several steps at once, where a fusion has them and the device can

    def __init__(self, config: ToveVisionConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def output_width(cls, config: ToveVisionConfig) -> int:
        """Width w of a token that the fusion returns."""
        return config.clip_width

    @classmethod
    def num_tokens(cls, config: ToveVisionConfig) -> int:
        """How many tokens M it returns for an image; may depend on which experts are attached."""
        return config.num_patches

    def options(self, **defaults: Any) -> dict[str, Any]:
        """``config.fusion_options`` over ``defaults``.

        Raises:
            ConfigError: an option that is not among the defaults.
        """
        given = self.config.fusion_options or {}
        unknown = sorted(set(given) - set(defaults))
        if unknown:
            known = ", ".join(sorted(defaults)) or "none"
            raise ConfigError(f"unknown fusion_options {unknown} of {self.config.fusion!r}; it knows: {known}")
        return {**defaults, **given}

    @abstractmethod
    def forward(
        self,
        base: torch.Tensor,
        experts: Mapping[str, torch.Tensor],
        *,
        noise: torch.Tensor | None = None,
        usable: Mapping[str, torch.Tensor] | None = None,
    ) -> FusionOutput:
        """
        Args:
            base: ``[B,N,d]`` CLIP's tokens.
            experts: feature map ``[B,d_k,h_k,w_k]`` of each attached expert, by name; every value finite.
            noise: ``[B,N,S]`` standard normal noise for the gate instead of a fresh draw; used in training only.
            usable: ``[B]`` bool by expert, False for images for which its output cannot be used.
        """

    def transfers(
        self,
        base: torch.Tensor,
        experts: Mapping[str, torch.Tensor],
        *,
        usable: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """What each attached expert adds to the tokens, without noise: ``[B,N,d]`` by expert (``G_k P_k`` for ToVE).

        Empty for a fusion that does not add. Arguments as in :meth:`forward`.
        """
        return {}

    def balance_statistics(self, inputs: GateInputs | list[GateInputs] | None) -> BalanceStatistics | None:
        """Statistics of the balance loss, recomputed with gradients from a gate's inputs; None without a gate.

        The inputs of several batches in a list are computed in one pass of the gate, so that ranks whose windows hold
        different numbers of batches with images still run the gate equally often, as ZeRO-3 needs. ``None`` (or an
        empty list) gives the statistics of no image at all; it touches the same parameters.
        """
        return None
