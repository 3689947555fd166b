"""The gated knowledge instead of CLIP's tokens: ToVE without the residual.

``T' = W_o( sum_k G_k * H_k )``. The gate still reads CLIP's tokens. With a single expert it decides nothing, and the
tower is that expert without CLIP.
"""

from __future__ import annotations

from torch import Tensor, nn

from tove_llava.tower.fusion.base import register_fusion
from tove_llava.tower.fusion.tove_gate import ToveFusion


@register_fusion("replace")
class ReplaceFusion(ToveFusion):
    """``tove`` without CLIP's tokens; its output layer cannot start at zero."""

    output_layer = nn.Linear

    def combine(self, base: Tensor, delta: Tensor) -> Tensor:
        return delta
