"""Equal weights: ``T' = T + W_o( mean_k H_k )``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tove_llava.tower.embedding import STEM_WIDTH, ClosedLinear, ExpertEmbeddings
from tove_llava.tower.fusion.base import ByExpert, Fusion, FusionOutput, register_fusion
from tove_llava.tower.tower_config import ToveVisionConfig


@register_fusion("add")
class AddFusion(Fusion):
    """``tove`` with the mean over usable experts instead of the gate."""

    option_defaults: ClassVar[Mapping[str, Any]] = {"stem_width": STEM_WIDTH}

    def __init__(self, config: ToveVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = ExpertEmbeddings(config, self.options["stem_width"])
        self.output = ClosedLinear(config.projection_dim, config.clip_width, bias=False)

    def forward(
        self, base: Tensor, experts: ByExpert, *, noise: Tensor | None = None, usable: ByExpert | None = None
    ) -> FusionOutput:
        total = torch.zeros(
            *base.shape[:2], self.config.projection_dim, device=base.device, dtype=self.output.weight.dtype
        )  # [B,N,m]
        for hidden in self._weighted(experts, usable).values():
            total = total + hidden
        if self.training:
            for name in self.config.detached_experts:  # in one order on every rank
                total = total + self.embeddings.touched(name, base.device).to(total.dtype)
        return FusionOutput(tokens=base + self.output(total).to(base.dtype))

    def transfers(self, base: Tensor, experts: ByExpert, *, usable: ByExpert | None = None) -> dict[str, Tensor]:
        return {name: self.output(hidden) for name, hidden in self._weighted(experts, usable).items()}

    def _weighted(self, experts: ByExpert, usable: ByExpert | None) -> dict[str, Tensor]:
        """Compute ``H_k / number of usable experts``, ``[B,N,m]`` by attached expert."""
        names = self.config.attached_experts
        hidden = {name: self.embeddings.hidden(name, experts[name], usable) for name in names}
        count: Tensor | int = len(names)
        if usable:
            marks = [usable.get(name) for name in names]
            present = sum(1 if mark is None else mark.long() for mark in marks)  # [B], or a number
            count = torch.as_tensor(present).clamp(min=1).view(-1, 1, 1)
        return {name: x / (count.to(x) if isinstance(count, Tensor) else count) for name, x in hidden.items()}
