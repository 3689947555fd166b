"""The optimiser: the one of ``--optim``, or Muon for the matrices that a merge chose for it.

Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal before the step. Its steps are scaled to AdamW's
size (Liu et al. 2025, arXiv 2502.16982), so both take the same learning rates.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tove_llava.core.registry import Registry
from tove_llava.train.merging import MergingTower

MERGE_OPTIMIZERS: Registry[Callable[[MergingTower], list[nn.Parameter]]] = Registry("merge optimizer")


@MERGE_OPTIMIZERS.register("adamw")
def adamw(tower: MergingTower) -> list[nn.Parameter]:
    """Nothing for Muon."""
    return []


@MERGE_OPTIMIZERS.register("muon")
def muon(tower: MergingTower) -> list[nn.Parameter]:
    """The student's matrices; its embeddings, norms and biases stay with AdamW."""
    return tower.matrices()


def make_optimizer(
    groups: list[dict[str, Any]], cls: type[torch.optim.Optimizer], options: dict[str, Any]
) -> torch.optim.Optimizer:
    """The optimiser of a stage.

    Args:
        groups: what :func:`tove_llava.train.stages.parameter_groups` returned.
        cls: for groups without ``muon: True``; with such groups these get AdamW.
        options: of ``cls``.
    """
    if not any(group.get("muon") for group in groups):
        return cls(groups, **options)
    from timm.optim import Muon

    marked = [{**group, "use_fallback": not group.get("muon", False)} for group in groups]
    return Muon(
        marked,
        lr=options["lr"],
        betas=options.get("betas", (0.9, 0.999)),
        eps=options.get("eps", 1e-8),
        weight_decay=0.0,  # every group has its own
        adjust_lr_fn="match_rms_adamw",
    )
