"""Settings of sampling, and the choice of tokens from logits [B, V]."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from tove_llava.core.errors import DataError

COLDEST = 0.01  # below it, logits divided by the temperature leave float32's range


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer; a value out of range is a DataError.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 takes the most likely token each time.
        top_p: draw from the fewest tokens whose probabilities sum to this; 1 draws from all. Ignored at temperature 0.
        min_new_tokens: no answer ends before it has this many tokens.
        seed: draws the same answer each time; None draws another.
        stop: texts at which the answer ends, without them.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    min_new_tokens: int = 0
    seed: int | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise DataError(f"max_new_tokens is {self.max_new_tokens}; an answer has at least 1 token")
        if self.temperature != 0 and not COLDEST <= self.temperature <= 100:
            raise DataError(
                f"temperature is {self.temperature}; use 0 (the most likely token), or {COLDEST} to 100 (1 is usual)"
            )
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p is {self.top_p}; it is a probability above 0, at most 1")


def warped(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Divide logits by a temperature; set words outside ``top_p`` to -inf."""
    logits = TemperatureLogitsWarper(float(temperature))(None, logits)
    return TopPLogitsWarper(float(top_p))(None, logits) if top_p < 1 else logits


def drawn(logits: Tensor, draws: Sequence[float]) -> Tensor:
    """Return the ids [B] at which the summed probabilities pass the draws."""
    points = torch.tensor(draws, device=logits.device, dtype=torch.float64)
    sums = logits.double().softmax(dim=-1).cumsum(dim=-1)  # [B, V]
    # Strictly above, so that a word of probability 0 is never drawn.
    return torch.searchsorted(sums, (points * sums[:, -1])[:, None], right=True)[:, 0].clamp_max(sums.shape[1] - 1)
