"""Experts' tokens after CLIP's, as in Prismer (arXiv 2303.02506).

``T' = [T ; W_o pool(H_1) ; ... ; W_o pool(H_K)]`` in the language model's sequence. Prismer reduces the experts to a
fixed number of tokens with a resampler. Here their grid is averaged over ``pool x pool`` cells (``fusion_options:
{pool: 2}``; 1 keeps every token).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tove_llava.core.errors import ConfigError
from tove_llava.tower.embedding import STEM_WIDTH, ExpertEmbeddings
from tove_llava.tower.fusion.base import ByExpert, Fusion, FusionOutput, register_fusion
from tove_llava.tower.tower_config import ToveVisionConfig

POOL = 2


@register_fusion("sequence_append")
class SequenceAppendFusion(Fusion):
    """``tove``'s first layers, pooling, and an output layer; detached experts add nothing."""

    option_defaults: ClassVar[Mapping[str, Any]] = {"stem_width": STEM_WIDTH, "pool": POOL}

    def __init__(self, config: ToveVisionConfig) -> None:
        super().__init__(config)
        self.pool = self.options["pool"]
        self.num_tokens(config)  # refuses a pool that does not fit
        self.embeddings = ExpertEmbeddings(config, self.options["stem_width"])
        self.output = nn.Linear(config.projection_dim, config.clip_width, bias=False)

    @classmethod
    def num_tokens(cls, config: ToveVisionConfig) -> int:
        pool = (config.fusion_options or {}).get("pool", POOL)
        if not isinstance(pool, int) or pool < 1 or config.grid % pool:
            raise ConfigError(f"fusion_options pool={pool!r} must divide the token grid's side, {config.grid}")
        return config.num_patches + len(config.attached_experts) * (config.grid // pool) ** 2

    def forward(
        self, base: Tensor, experts: ByExpert, *, noise: Tensor | None = None, usable: ByExpert | None = None
    ) -> FusionOutput:
        parts = [base]
        for name in self.config.attached_experts:
            hidden = self.embeddings.hidden(name, experts[name], usable)  # [B,N,m]
            maps = hidden.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid))  # [B,m,g,g]
            pooled = F.avg_pool2d(maps, self.pool).flatten(2).transpose(1, 2)  # [B,n,m]
            parts.append(self.output(pooled).to(base.dtype))  # [B,n,d]
        if self.training:
            for name in self.config.detached_experts:
                parts[0] = parts[0] + self.embeddings.touched(name, base.device).to(base.dtype)
            nothing = torch.zeros(0, self.config.projection_dim, device=base.device, dtype=self.output.weight.dtype)
            parts[0] = parts[0] + self.output(nothing).sum().to(base.dtype)  # also with every expert detached
        return FusionOutput(tokens=torch.cat(parts, dim=1))  # [B,N+K*n,d]
