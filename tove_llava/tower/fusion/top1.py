"""One expert per token.

``T' = T + W_o( G_j * H_j )`` with ``j = argmax_k G_k``. The weight is the softmax's over all experts, not 1: the
language model's loss reaches the gate only through it (Fedus et al. 2021, "Switch Transformers", section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tove_llava.core.errors import ConfigError
from tove_llava.tower.fusion.base import register_fusion
from tove_llava.tower.fusion.tove_gate import ToveFusion
from tove_llava.tower.gate import TokenGate, register_gate
from tove_llava.tower.tower_config import ToveVisionConfig


@register_gate("top1")
class Top1Gate(TokenGate):
    """The likeliest column, with its probability among all."""

    @classmethod
    def from_config(cls, config: ToveVisionConfig, slots: int) -> TokenGate:
        if config.top_k not in (None, 1):
            raise ConfigError(f"fusion 'top1' chooses one expert; leave top_k out instead of {config.top_k}")
        return cls(config.clip_width, slots, noisy=config.noisy_gating, top_k=1, keep_probability=True)


@register_fusion("top1")
class Top1Fusion(ToveFusion):
    """``tove`` with a hard choice; only the chosen rows are computed."""

    option_defaults: ClassVar[Mapping[str, Any]] = {**ToveFusion.option_defaults, "gate": "top1"}
