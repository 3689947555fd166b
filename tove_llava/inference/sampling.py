"""How the next token is chosen, for each row of a batch by itself.

``B`` rows, ``V`` words.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from tove_llava.core.errors import DataError

COLDEST = 0.01  # below it, logits divided by the temperature leave float32's range


@dataclass(frozen=True)
class Sampling:
    """What a question says of its answer.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 takes the most likely token each time.
        top_p: draw from the fewest tokens whose probabilities sum to this; 1 draws from all. Without effect at
            temperature 0.

    Raises:
        DataError: a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise DataError(f"max_new_tokens is {self.max_new_tokens}; an answer has at least 1 token")
        if self.temperature != 0 and not COLDEST <= self.temperature <= 100:
            raise DataError(
                f"temperature is {self.temperature}; use 0 (the most likely token), or {COLDEST} to 100 (1 is usual)"
            )
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p is {self.top_p}; it is a probability above 0, at most 1")


def next_tokens(logits: Tensor, samplings: Sequence[Sampling], chance: Callable[[], float] = random.random) -> Tensor:
    """[B] token ids.

    Args:
        logits: float32 [B, V].
        chance: gives numbers in [0, 1), one for each row that is drawn.
    """
    tokens = logits.argmax(dim=-1)
    groups: dict[tuple[float, float], list[int]] = {}
    for row, sampling in enumerate(samplings):
        if sampling.temperature:
            groups.setdefault((sampling.temperature, sampling.top_p), []).append(row)
    for (temperature, top_p), rows in groups.items():
        tokens[rows] = drawn(warped(logits[rows], temperature, top_p), [chance() for _ in rows])
    return tokens


def warped(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """[B, V] logits at a temperature above 0, words outside of ``top_p`` at -inf."""
    logits = TemperatureLogitsWarper(float(temperature))(None, logits)
    return TopPLogitsWarper(float(top_p))(None, logits) if top_p < 1 else logits


def drawn(logits: Tensor, draws: Sequence[float]) -> Tensor:
    """[B] token ids: where each draw in [0, 1) falls among the row's summed probabilities."""
    places = torch.tensor(draws, device=logits.device, dtype=torch.float64)
    sums = logits.double().softmax(dim=-1).cumsum(dim=-1)  # [B, V]
    # Strictly above, so that a word of probability 0 is never drawn.
    return torch.searchsorted(sums, (places * sums[:, -1])[:, None], right=True)[:, 0].clamp_max(sums.shape[1] - 1)
