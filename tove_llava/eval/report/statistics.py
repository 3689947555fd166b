"""Intervals and tests over questions, with fixed seeds.

Questions are resampled independently; that several may be about one image is not modelled. Intervals are percentile
bootstrap intervals (Efron and Tibshirani 1993, ch. 13).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import numpy as np

from tove_llava.core.errors import ConfigError

try:
    from scipy.stats import binomtest, bootstrap
except ImportError as error:
    raise ConfigError("a report's statistics need scipy; install it: pip install 'tove-llava[eval]'") from error

_CELLS = 4_000_000  # of a block of resampled indices: 32 MB
# Up to this many distinct values, their counts are drawn instead of questions: the same distribution, 400 times as fast
# for 12,000 questions.
_FEW = 64


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
    """Settings of the resampling.

    Attributes:
        resamples: how often.
        seed: of every draw.
        level: of the intervals.
    """

    resamples: int = 10_000
    seed: int = 0
    level: float = 0.95

    def means(self, values: Sequence[float] | Any) -> Any:
        """Return float64 [resamples], the mean of each resample of the values, [n]."""
        values = np.sort(np.asarray(values, dtype=np.float64))  # the order of questions must not matter
        generator = np.random.default_rng(self.seed)
        distinct, counts = np.unique(values, return_counts=True)
        if len(distinct) <= _FEW:
            drawn = generator.multinomial(len(values), counts / len(values), size=self.resamples)
            return drawn @ distinct / len(values)
        batch = max(1, _CELLS // len(values))
        found = bootstrap(
            (values,), np.mean, n_resamples=self.resamples, batch=batch, method="percentile", random_state=generator
        )
        return found.bootstrap_distribution

    def interval(self, values: Sequence[float] | Any) -> Interval:
        """Return the values' mean with its percentile interval.

        Raises:
            ValueError: there is no value.
        """
        if len(values) == 0:
            raise ValueError("no values")
        tail = (1 - self.level) / 2
        low, high = np.quantile(self.means(values), (tail, 1 - tail))
        return Interval(fsum(values) / len(values), float(low), float(high), len(values))

    def difference(self, first: Sequence[float], second: Sequence[float]) -> Difference:
        """Compare question by question: McNemar for values 0 and 1, else bootstrap.

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
        """Return the share of centred resamples as extreme as the mean."""
        seen = abs(change.mean())
        strays = np.abs(self.means(change - change.mean()))
        # A tie is as far; the last digits of a sum must not decide. The mean seen counts as one resample.
        return float((1 + (strays >= seen - 1e-12).sum()) / (1 + self.resamples))


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided exact p of McNemar's test.

    Questions on which only one run is right are coin tosses.
    """
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def holm(values: Mapping[Any, float]) -> dict[Any, float]:
    """Correct p values for their number (Holm 1979)."""
    corrected, largest = {}, 0.0
    for rank, (key, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(values) - rank)))
        corrected[key] = largest
    return {key: corrected[key] for key in values}
