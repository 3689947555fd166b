"""The language model's loss, without logits of unsupervised tokens.

Most tokens of LLaVA's records are image tokens and questions. Their logits, by far the largest tensor of a step, are
not needed. If there are many others, these are computed in pieces.
"""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

PIECE = 2**26  # logits of one piece; 256 MB in float32


def supervised_loss(
    hidden: Tensor, labels: Tensor, positions: Tensor, head: nn.Module, num_items: Tensor | int | None = None
) -> Tensor:
    """Compute the next-token cross-entropy from logits at the given indices.

    Args:
        hidden: ``[B,L,D]``.
        labels: int64 ``[B,L]``.
        positions: int64 ``[n]``, indices in the flattened batch; the label after each is supervised. There may be none.
        head: the language model's output layer.
        num_items: divisor of the sum; None takes the mean.
    """
    states = hidden.flatten(0, 1).index_select(0, positions)  # [n,D]
    targets = labels.flatten().index_select(0, positions + 1)  # [n]
    total = _sum(states, targets, head)
    return total / (max(len(targets), 1) if num_items is None else num_items)


def _sum(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    weight = head.weight
    assert isinstance(weight, Tensor)
    rows = PIECE // max(len(weight), 1)
    # ZeRO-3 gathers the head for each call, so all ranks have to call it equally often.
    if len(states) <= rows or hasattr(weight, "ds_id"):
        return _piece(states, targets, head)
    pieces = zip(states.split(rows), targets.split(rows), strict=True)
    total: Tensor = sum(checkpoint(_piece, x, y, head, use_reentrant=False) for x, y in pieces)  # type: ignore[arg-type, assignment]
    return total


def _piece(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    return cross_entropy(head(states).float(), targets, reduction="sum")
