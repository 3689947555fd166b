"""No fusion, the baseline: CLIP's tokens through the same code path."""

from __future__ import annotations

from torch import Tensor

from tove_llava.tower.fusion.base import ByExpert, Fusion, FusionOutput, register_fusion


@register_fusion("none")
class NoFusion(Fusion):
    uses_experts = False

    def forward(
        self, base: Tensor, experts: ByExpert, *, noise: Tensor | None = None, usable: ByExpert | None = None
    ) -> FusionOutput:
        return FusionOutput(tokens=base)
