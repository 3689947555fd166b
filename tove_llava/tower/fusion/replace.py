"""The gated knowledge in place of CLIP's tokens: what ToVE would be without the residual.

``T' = W_o( sum_k G_k * H_k )``. The gate still reads CLIP's tokens; with a single expert it has nothing to decide, so
the tower is then that expert without CLIP.
"""

from __future__ import annotations

import torch
from torch import nn

from tove_llava.tower.configuration import FUSIONS
from tove_llava.tower.fusion.tove import ToveFusion


@FUSIONS.register("replace")
class ReplaceFusion(ToveFusion):
    """As ``tove``, but nothing of CLIP's tokens is kept, so the output layer cannot start at zero.

    With every expert detached the tokens are zero.
    """

    output_layer = nn.Linear

    def combine(self, base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return delta
