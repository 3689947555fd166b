"""Count an expert's cost from its configuration; nothing is loaded or computed."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from tove_llava.experts.base import Expert


@dataclass(frozen=True)
class Cost:
    """The cost of one expert in its mode."""

    parameters: int
    flops: int  # per image at the expert's image size, two per multiply-add


def expert_cost(expert: Expert) -> Cost:
    """Count on the meta device, by ``torch.utils.flop_counter``."""
    twin = expert.meta_twin()
    pixels = torch.empty(1, 3, twin.image_size, twin.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin.features(pixels)
    return Cost(sum(p.numel() for p in twin.parameters()), counter.get_total_flops())
