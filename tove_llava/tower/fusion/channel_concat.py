"""Experts next to CLIP: ``T' = [T, H_1, ..., H_K]``.

They lie along the channels, which the projector mixes, as in DeepSeek-VL (arXiv 2403.05525), Eagle (arXiv 2408.15998)
and Florence-VL (arXiv 2412.04424). The number of tokens stays, and each is ``d + K m`` wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tove_llava.tower.embedding import STEM_WIDTH, ExpertEmbeddings
from tove_llava.tower.fusion.base import ByExpert, Fusion, FusionOutput, register_fusion
from tove_llava.tower.tower_config import ToveVisionConfig


@register_fusion("channel_concat")
class ChannelConcatFusion(Fusion):
    """``tove``'s first layers; the channels of a detached expert are zero."""

    option_defaults: ClassVar[Mapping[str, Any]] = {"stem_width": STEM_WIDTH}

    def __init__(self, config: ToveVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = ExpertEmbeddings(config, self.options["stem_width"])

    @classmethod
    def output_width(cls, config: ToveVisionConfig) -> int:
        return config.clip_width + len(config.experts) * config.projection_dim

    def forward(
        self, base: Tensor, experts: ByExpert, *, noise: Tensor | None = None, usable: ByExpert | None = None
    ) -> FusionOutput:
        parts = [base]
        for name in self.config.expert_names:
            if name in self.config.attached_experts:
                hidden = self.embeddings.hidden(name, experts[name], usable)  # [B,N,m]
            else:
                hidden = torch.zeros(*base.shape[:2], self.config.projection_dim, device=base.device, dtype=base.dtype)
                if self.training:
                    hidden = hidden + self.embeddings.touched(name, base.device).to(hidden.dtype)
            parts.append(hidden.to(base.dtype))
        return FusionOutput(tokens=torch.cat(parts, dim=-1))  # [B,N,d+K*m]
