"""Measure the student's distance from the tower: ``L_merge`` of each image.

The paper gives no formula; these are our choices. ``T'`` are the tower's tokens, which get no gradient, and ``T`` are
CLIP's. The unit of distance is the root mean square of ``T' - T``, so that CLIP's scale does not matter: with ``mse`` a
student that is still CLIP has a loss of 1, and 0.1 means that nine tenths of the transferred knowledge are learned. An
image's loss depends on no other image, so the mean over a global batch does not depend on how it is split.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from tove_llava.core.registry import Registry

TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
MERGE_LOSSES: Registry[TokenLoss] = Registry("merge loss")
TokenWeights = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TOKEN_WEIGHTS: Registry[TokenWeights] = Registry("kind of token weights")

# Lower limit of the squared unit, as a share of CLIP's mean square, for towers that transfer almost nothing.
_FLOOR = 1e-4


@MERGE_LOSSES.register("mse")
def mse(student: torch.Tensor, target: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error: tokens ``[B,N,d]``, unit ``[B,1,1]`` -> ``[B,N]``."""
    return ((student - target) / unit).square().mean(-1)


@MERGE_LOSSES.register("smooth_l1")
def smooth_l1(student: torch.Tensor, target: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Square distances below one unit only: huge channels weigh less."""
    return F.smooth_l1_loss(student / unit, target / unit, reduction="none").mean(-1)


@MERGE_LOSSES.register("cosine")
def cosine(student: torch.Tensor, target: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return one minus the cosine of a token and its target."""
    return 1 - F.cosine_similarity(student, target, dim=-1)


@TOKEN_WEIGHTS.register("uniform")
def uniform(base: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Weigh every token equally: ``[B,N,d]`` twice -> ``[B,N]``."""
    return torch.ones_like(base[..., 0])


@TOKEN_WEIGHTS.register("transfer")
def transfer(base: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Weigh a token by what was transferred to it: ``|T' - T|``."""
    return (target - base).norm(dim=-1)


def merge_loss(
    student: torch.Tensor,
    base: torch.Tensor,
    target: torch.Tensor,
    *,
    loss: str = "mse",
    token_weights: str = "uniform",
) -> torch.Tensor:
    """Return ``L_merge`` of each image.

    Args:
        student: ``[B,N,d]`` tokens that learn.
        base: ``[B,N,d]`` CLIP's tokens.
        target: ``[B,N,d]`` the tower's tokens.
        loss: a registered merge loss.
        token_weights: a registered kind of weights; their mean is made 1 in each image.

    Returns:
        ``[B]`` float32.

    Raises:
        ConfigError: an unknown name.
    """
    student, base, target = student.float(), base.detach().float(), target.detach().float()
    transferred = (target - base).square().mean((1, 2), keepdim=True)  # [B,1,1]
    floor = _FLOOR * base.square().mean((1, 2), keepdim=True)
    unit = torch.maximum(transferred, floor).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    weights = TOKEN_WEIGHTS.get(token_weights)(base, target)  # [B,N]
    total = weights.sum(1, keepdim=True)
    weights = torch.where(total > 0, weights * weights.shape[1] / total.clamp(min=1e-20), torch.ones_like(weights))
    return (weights * MERGE_LOSSES.get(loss)(student, target, unit)).mean(1)
