"""The contract of a fusion, the trainable part of a tower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

from torch import Tensor, nn

from tove_llava.core.errors import ConfigError
from tove_llava.tower.balance_loss import BalanceStatistics
from tove_llava.tower.tower_config import FUSIONS, ToveVisionConfig

ByExpert: TypeAlias = Mapping[str, Tensor]  # by expert


class GateInputs(NamedTuple):
    """A gate's inputs, kept for the accumulation window's balance loss.

    Args:
        tokens: ``[B,N,d]`` CLIP's tokens, without graph.
        noise: ``[B,N,S]`` float32 standard normal, or None for a gate that ran without noise.
        usable: ``[B,K]`` bool, False for an expert that was dropped for an image; None if none was.
    """

    tokens: Tensor
    noise: Tensor | None = None
    usable: Tensor | None = None


class FusionOutput(NamedTuple):
    """A fusion's tokens, and its gate's decisions.

    Args:
        tokens: ``[B,M,w]``, in the dtype of CLIP's tokens; ``[B,N,d]`` for a fusion that keeps their shape.
        routing: ``[B,N,S]`` float32 gate weights, or None for a fusion without a gate.
        gate_logits: ``[B,N,S]`` float32 before noise and masks, or None.
        gate_inputs: input of :meth:`Fusion.balance_statistics`, or None for a fusion without a gate.
    """

    tokens: Tensor
    routing: Tensor | None = None
    gate_logits: Tensor | None = None
    gate_inputs: GateInputs | None = None


F = TypeVar("F", bound="type[Fusion]")


def register_fusion(name: str) -> Callable[[F], F]:
    """Return a class decorator that registers a :class:`~tove_llava.tower.Fusion` under ``name``.

    ``vision.fusion: NAME`` in a preset chooses it.

    Args:
        name: not yet a fusion's.

    Raises:
        ConfigError: another fusion has that name.

    Example:
        >>> from tove_llava.tower.fusion import Fusion, FusionOutput
        >>> @tove_llava.register_fusion("scaled")
        ... class Scaled(Fusion):
        ...     uses_experts = False
        ...     def __init__(self, config):
        ...         super().__init__(config)
        ...         self.scale = torch.nn.LayerNorm(config.clip_width)
        ...     def forward(self, base, experts, *, noise=None, usable=None):
        ...         return FusionOutput(self.scale(base))  # [B,N,d]
        >>> tower = tove_llava.load_tower("tiny", overrides=["vision.fusion=scaled"])
        >>> [name for name, _ in tower.named_parameters()]
        ['fusion.scale.weight', 'fusion.scale.bias']
    """
    return FUSIONS.register(name)


class Fusion(nn.Module, ABC):
    """Base class of fusions, registered by ``@register_fusion(name)``.

    A fusion takes the tower's configuration and reads its ``detached_experts`` at every call, as they may change.
    ``self.options`` holds its options: ``option_defaults``, overridden by the configuration's ``fusion_options``.
    Each layer with parameters sets its initial values in ``reset_parameters``, with ``torch.nn.init``.
    """

    uses_experts: ClassVar[bool] = True
    option_defaults: ClassVar[Mapping[str, Any]] = {}  # the keys that fusion_options may have
    fused: bool = False  # use fused kernels, if the fusion has them and the device runs them

    def __init__(self, config: ToveVisionConfig) -> None:
        super().__init__()
        self.config = config
        given = config.fusion_options or {}
        unknown = sorted(set(given) - set(self.option_defaults))
        if unknown:
            known = ", ".join(sorted(self.option_defaults)) or "none"
            raise ConfigError(f"unknown fusion_options {unknown} of {config.fusion!r}; it knows: {known}")
        self.options = {**self.option_defaults, **given}

    @classmethod
    def output_width(cls, config: ToveVisionConfig) -> int:
        """Return the width w of the fusion's tokens."""
        return config.clip_width

    @classmethod
    def num_tokens(cls, config: ToveVisionConfig) -> int:
        """Return M, tokens per image; it may depend on attached experts."""
        return config.num_patches

    @abstractmethod
    def forward(
        self, base: Tensor, experts: ByExpert, *, noise: Tensor | None = None, usable: ByExpert | None = None
    ) -> FusionOutput:
        """Fuse CLIP's tokens with the experts' features.

        Args:
            base: ``[B,N,d]`` CLIP's tokens.
            experts: feature map ``[B,d_k,h_k,w_k]`` of each attached expert, by name; every value finite.
            noise: ``[B,N,S]`` standard normal noise for the gate instead of a fresh draw; used in training only.
            usable: ``[B]`` bool by expert, False for images for which its output cannot be used.
        """

    def transfers(self, base: Tensor, experts: ByExpert, *, usable: ByExpert | None = None) -> dict[str, Tensor]:
        """Compute what each attached expert adds to the tokens: ``[B,N,d]``.

        Without noise (ToVE's ``G_k P_k``). Empty for a fusion that does not add. Arguments as in :meth:`forward`.
        """
        return {}

    def balance_statistics(self, inputs: GateInputs | list[GateInputs] | None) -> BalanceStatistics | None:
        """Recompute balance statistics, with gradients; None without a gate.

        Inputs of several batches in one list take one pass of the gate. So ranks with different numbers of image
        batches in a window run the gate equally often, as ZeRO-3 needs. ``None`` (or an empty list) gives the
        statistics of no image, through the same parameters.
        """
        return None
