"""One expert per token.

``T' = T + W_o( G_j * H_j )`` with ``j = argmax_k G_k``. The weight is the softmax's over all experts, not 1: the
language model's loss reaches the gate only through it (Fedus et al. 2021, "Switch Transformers", section 2.1).
"""

from __future__ import annotations

from tove_llava.core.errors import ConfigError
from tove_llava.tower.fusion.tove_gate import ToveFusion
from tove_llava.tower.gate import TokenGate
from tove_llava.tower.tower_config import FUSIONS


@FUSIONS.register("top1")
class Top1Fusion(ToveFusion):
    """``tove`` with a hard choice; only the chosen rows are computed."""

    def make_gate(self, slots: int) -> TokenGate:
        if self.config.top_k not in (None, 1):
            raise ConfigError(f"fusion 'top1' chooses one expert; leave top_k out instead of {self.config.top_k}")
        return TokenGate(self.config.clip_width, slots, noisy=self.config.noisy_gating, top_k=1, keep_probability=True)
