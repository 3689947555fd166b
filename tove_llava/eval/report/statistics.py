"""Intervals and tests over questions, with fixed seeds: the same numbers give the same page.

Questions are resampled independently; that several may be about one picture is not modelled. Intervals are percentile
bootstrap intervals (Efron and Tibshirani 1993, ch. 13).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import numpy as np

_CELLS = 4_000_000  # of a block of resampled indices: 32 MB
_FEW = 64  # up to this many distinct values their counts are drawn instead of questions; the distribution is the same


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, and over how many questions."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean difference of two runs over the same questions.

    Attributes:
        interval: of the second run's mean less the first's.
        p: two-sided probability of a difference at least as large if there is none.
        test: "McNemar" or "bootstrap".
        better, worse: questions on which the second run has more, or less, than the first.
    """

    interval: Interval
    p: float
    test: str
    better: int
    worse: int


@dataclass(frozen=True)
class Bootstrap:
    """How to resample.

    Attributes:
        resamples: how often.
        seed: of every draw.
        level: of the intervals.
    """

    resamples: int = 10_000
    seed: int = 0
    level: float = 0.95

    def means(self, values: Sequence[float] | Any) -> Any:
        """float64 [resamples]: the mean of each resample of the values, [n]."""
        values = np.sort(np.asarray(values, dtype=np.float64))  # the order of questions must not matter
        generator = np.random.default_rng(self.seed)
        distinct, counts = np.unique(values, return_counts=True)
        if len(distinct) <= _FEW:
            drawn = generator.multinomial(len(values), counts / len(values), size=self.resamples)
            return drawn @ distinct / len(values)
        rows = max(1, _CELLS // len(values))
        means = []
        for start in range(0, self.resamples, rows):
            shape = (min(rows, self.resamples - start), len(values))
            means.append(values.take(generator.integers(0, len(values), shape, dtype=np.int32)).mean(axis=1))
        return np.concatenate(means)

    def interval(self, values: Sequence[float] | Any) -> Interval:
        """The values' mean with its percentile interval.

        Raises:
            ValueError: there is no value.
        """
        if len(values) == 0:
            raise ValueError("no values")
        tail = (1 - self.level) / 2
        low, high = np.quantile(self.means(values), (tail, 1 - tail))
        return Interval(fsum(values) / len(values), float(low), float(high), len(values))

    def difference(self, first: Sequence[float], second: Sequence[float]) -> Difference:
        """Second less first, question by question: exact McNemar where every value is 0 or 1, else the bootstrap.

        Raises:
            ValueError: the runs have different numbers of questions, or none.
        """
        a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
        if a.shape != b.shape:
            raise ValueError(f"{len(a)} and {len(b)} questions cannot be paired")
        change = b - a
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
        p = mcnemar(better, worse) if binary else self._null(change)
        return Difference(self.interval(change), p, "McNemar" if binary else "bootstrap", better, worse)

    def _null(self, change: Any) -> float:
        """How often resamples of the differences, moved to mean zero, stray as far as the mean seen."""
        seen = abs(change.mean())
        strays = np.abs(self.means(change - change.mean()))
        # A tie is as far; the last digits of a sum must not decide. The mean seen counts as one resample.
        return float((1 + (strays >= seen - 1e-12).sum()) / (1 + self.resamples))


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p of McNemar's test: the questions on which only one run is right are coin tosses."""
    total, term, tail = better + worse, 1, 1
    for k in range(min(better, worse)):
        term = term * (total - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << total))


def holm(values: Mapping[Any, float]) -> dict[Any, float]:
    """p values corrected for their number (Holm 1979): the chance of one false find among them stays at the level."""
    corrected, largest = {}, 0.0
    for rank, (key, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(values) - rank)))
        corrected[key] = largest
    return {key: corrected[key] for key in values}
