"""No fusion: CLIP's tokens as they are, the baseline through the same code path."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tove_llava.tower.configuration import FUSIONS
from tove_llava.tower.fusion.base import Fusion, FusionOutput


@FUSIONS.register("none")
class NoFusion(Fusion):
    uses_experts = False

    def forward(
        self,
        base: torch.Tensor,
        experts: Mapping[str, torch.Tensor],
        *,
        noise: torch.Tensor | None = None,
        usable: Mapping[str, torch.Tensor] | None = None,
    ) -> FusionOutput:
        return FusionOutput(tokens=base)
