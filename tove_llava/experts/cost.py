"""What an expert costs, from its configuration alone: nothing is loaded and nothing is computed."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from tove_llava.experts.base import Expert


@dataclass(frozen=True)
class Cost:
    """Cost of one expert.

    Attributes:
        parameters: of the network as it is built for the expert's mode.
        flops: floating point operations per image at the expert's image size, two per multiply-add.
    """

    parameters: int
    flops: int


def expert_cost(expert: Expert) -> Cost:
    """Counts on the meta device (``torch.utils.flop_counter``: matrix products, convolutions and attention)."""
    twin = expert.meta_twin()
    pixels = torch.empty(1, 3, twin.image_size, twin.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin.features(pixels)
    return Cost(sum(p.numel() for p in twin.parameters()), counter.get_total_flops())
