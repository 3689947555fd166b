"""The gate's balance loss.

Shazeer et al. 2017, "Outrageously Large Neural Networks", section 4 and appendix A: ``CV(importance)^2 + CV(load)^2``.
CV is the coefficient of variation over the attached experts, ``importance_k`` the sum of gate weights over all tokens,
``load_k`` the expected number of tokens that choose expert k if its own noise is drawn again.

Both sums are additive over images; their CV is not. So the sums are added (over the micro-batches of an accumulation
window and over ranks), and the CV is taken once, of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# As in the authors' tensor2tensor (cv_squared): population variance, and this added to the denominator.
_EPSILON = 1e-10


@dataclass(frozen=True)
class BalanceStatistics:
    """Sums over some images' tokens; ``a + b`` covers both sets.

    Args:
        importance: ``[K]`` float32, sum of gate weights per expert, without the null slot.
        load: ``[K]`` float32, expected number of tokens that choose each expert; None when the gate has no noise.
        tokens: float32 scalar, number of tokens.
        attached: ``[K]`` bool, experts that are compared.
    """

    importance: Tensor
    load: Tensor | None
    tokens: Tensor
    attached: Tensor

    def __add__(self, other: BalanceStatistics) -> BalanceStatistics:
        if (self.load is None) != (other.load is None):
            raise ValueError("statistics with and without a load term cannot be added: one gate had noise")
        if not torch.equal(self.attached, other.attached):
            raise ValueError("statistics of towers with different attached experts cannot be added")
        return replace(
            self,
            importance=self.importance + other.importance,
            load=None if self.load is None or other.load is None else self.load + other.load,
            tokens=self.tokens + other.tokens,
        )

    def __radd__(self, other: object) -> BalanceStatistics:
        if other == 0:  # so that sum() works
            return self
        return NotImplemented

    def detach(self) -> BalanceStatistics:
        """Return the same numbers without their graph."""
        return replace(
            self, importance=self.importance.detach(), load=None if self.load is None else self.load.detach()
        )


def cv_squared(values: Tensor) -> Tensor:
    """Compute population variance over squared mean of ``[K]``.

    Fewer than two values, or only zeros, give zero (still differentiable).
    """
    if values.numel() < 2:
        return values.sum() * 0
    values = values.float()
    mean = values.mean()
    return (values - mean).square().mean() / (mean.square() + _EPSILON)


def balance_loss(statistics: BalanceStatistics) -> Tensor:
    """Compute ``CV(importance)^2 + CV(load)^2`` over the attached experts, a float32 scalar.

    Without noise there is no load term. One expert, or no tokens, gives zero.
    """
    loss = cv_squared(statistics.importance[statistics.attached])
    if statistics.load is not None:
        loss = loss + cv_squared(statistics.load[statistics.attached])
    return loss


def expected_load(clean: Tensor, noisy: Tensor, std: Tensor, allowed: Tensor, k: int) -> Tensor:
    """Compute the probability that each column is chosen (equation 9).

    ``P(x, i) = Phi((clean_i - kth_excluding(noisy, k, i)) / std_i)``: column i is among the k largest after its own
    noise is drawn again, while the other columns keep theirs.

    Args:
        clean, noisy, std: ``[..., S]`` float32: logits without noise, with it, and the noise's standard deviation.
        allowed: bool, broadcastable to them; columns that take part. Others get probability 0.
        k: number of columns that a token chooses.

    Returns:
        ``[..., S]`` float32 in 0..1. If at most k columns take part, each has probability 1.
    """
    allowed = allowed.expand_as(noisy)
    slots = noisy.shape[-1]
    if k >= slots:
        return allowed.to(noisy.dtype)
    masked = noisy.masked_fill(~allowed, float("-inf"))
    top, index = masked.topk(k + 1, dim=-1)  # [..., k+1]
    inside = torch.zeros_like(allowed).scatter(-1, index[..., :k], True)  # [..., S]
    # The k-th largest of the other columns: the (k+1)-th of all for a column in the top k, else the k-th.
    threshold = torch.where(inside, top[..., k : k + 1], top[..., k - 1 : k])
    bounded = threshold.isfinite()  # -inf: fewer than k others take part, so the column is always chosen
    distance = (clean - threshold.masked_fill(~bounded, 0.0)) / std
    chance = torch.special.ndtr(distance)
    return torch.where(bounded, chance, torch.ones_like(chance)).masked_fill(~allowed, 0.0)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.world_size = dist.get_world_size(group)
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.world_size, None


def all_reduce_statistics(statistics: BalanceStatistics, group: dist.ProcessGroup | None = None) -> BalanceStatistics:
    """Sum statistics over all ranks of ``group``, differentiably.

    Every rank must call it, even without images. Each rank adds the *whole* ``coefficient * balance_loss(global
    statistics)`` to its own loss; DDP and DeepSpeed then *average* gradients over ranks. So the backward pass
    multiplies by the number of ranks, without communication, and the average is exactly the gradient of the global
    batch's loss. Without an initialised process group the statistics are returned unchanged.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return statistics
    parts = [statistics.importance, statistics.tokens.reshape(1)]
    if statistics.load is not None:
        parts.append(statistics.load)
    total = _SumOverRanks.apply(torch.cat(parts), group)  # one collective
    experts = statistics.importance.numel()
    return replace(
        statistics,
        importance=total[:experts],
        tokens=total[experts].detach(),
        load=None if statistics.load is None else total[experts + 1 :],
    )
