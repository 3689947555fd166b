"""The balance loss, where the original adds up its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tove_llava.integrations.llava.tower import ToveVisionTower


class BalancedLoss:
    """A language model's own loss function plus the tower's balance loss.

    It is a term of the loss, not a gradient injected after the tower, so that a trainer treats both terms alike
    (division by accumulation steps, loss scaling in fp16).
    """

    def __init__(self, language: Any, llava: nn.Module) -> None:
        self.language = language
        self.llava = llava

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = self.language(*args, **kwargs)
        tower = self.llava.get_vision_tower()
        term = tower.balance_loss() if isinstance(tower, ToveVisionTower) else None
        return loss if term is None else loss + term.to(loss)
