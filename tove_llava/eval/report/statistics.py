"""Intervals and tests over questions, with fixed seeds.

Where several questions are about one image, images are resampled, each with its questions. Intervals are percentile
bootstrap intervals (Efron and Tibshirani 1993, ch. 13).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, fsum, log2, sqrt
from typing import Any

import numpy as np

from tove_llava.core.errors import ConfigError

try:
    from scipy.stats import binomtest, bootstrap, norm
except ImportError as error:
    raise ConfigError("a report's statistics need scipy; install it: pip install 'tove-llava[eval]'") from error

POWER = 0.8  # with which a detectable difference is found
Groups = Sequence[Hashable]  # each question's image, or another name for one without
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
        detectable: the smallest true difference that these questions show four times in five; None for one image.
    """

    interval: Interval
    p: float
    test: str
    better: int
    worse: int
    detectable: float | None


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

    def means(self, values: Sequence[float] | Any, groups: Groups | None = None) -> Any:
        """Return float64 [resamples], the mean of each resample of the values, [n]."""
        sums, sizes = _clusters(values, groups)
        if sizes.max() > 1:
            return self._ratios(sums, sizes)
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

    def _ratios(self, sums: Any, sizes: Any) -> Any:
        """Return the mean of each resample of whole groups."""
        generator = np.random.default_rng(self.seed)
        kinds, counts = np.unique(np.stack([sums.round(12), sizes], axis=1), axis=0, return_counts=True)
        if len(kinds) <= _FEW:
            drawn = generator.multinomial(len(sums), counts / len(sums), size=self.resamples)
            return (drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1])
        ordered = np.repeat(kinds, counts, axis=0)
        found = []
        for start in range(0, self.resamples, batch := max(1, _CELLS // len(ordered))):
            size = (min(batch, self.resamples - start), len(ordered))
            chosen = ordered[generator.integers(len(ordered), size=size)].sum(axis=1)
            found.append(chosen[:, 0] / chosen[:, 1])
        return np.concatenate(found)

    def interval(self, values: Sequence[float] | Any, groups: Groups | None = None) -> Interval:
        """Return the values' mean with its percentile interval.

        Raises:
            ValueError: there is no value.
        """
        if len(values) == 0:
            raise ValueError("no values")
        tail = (1 - self.level) / 2
        low, high = np.quantile(self.means(values, groups), (tail, 1 - tail))
        return Interval(fsum(values) / len(values), float(low), float(high), len(values))

    def difference(self, first: Sequence[float], second: Sequence[float], groups: Groups | None = None) -> Difference:
        """Compare question by question: McNemar for values 0 and 1 of separate images, else bootstrap.

        Raises:
            ValueError: the runs have different numbers of questions, or none.
        """
        a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
        if a.shape != b.shape:
            raise ValueError(f"{len(a)} and {len(b)} questions cannot be paired")
        change = b - a
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
        exact = binary and _clusters(a, groups)[1].max() <= 1
        p = mcnemar(better, worse) if exact else self._null(change, groups)
        interval, test = self.interval(change, groups), "McNemar" if exact else "bootstrap"
        return Difference(interval, p, test, better, worse, self.detectable(change, groups, binary))

    def detectable(self, change: Any, groups: Groups | None, binary: bool = False) -> float | None:
        """Return the smallest true mean change that a test over these questions shows in :data:`POWER` of all cases.

        It follows from the spread of the changes. Exact tests of right and wrong also need enough questions on which
        the runs differ: six at 5 %.
        """
        change = np.asarray(change, dtype=np.float64)
        sums, sizes = _clusters(change - change.mean(), groups)
        if len(sums) < 2:
            return None
        error = sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / sizes.sum()
        least = ceil(log2(2 / (1 - self.level))) / len(change) if binary else 0.0
        return max(float(norm.ppf((1 + self.level) / 2) + norm.ppf(POWER)) * error, least)

    def _null(self, change: Any, groups: Groups | None) -> float:
        """Return the share of centred resamples as extreme as the mean."""
        seen = abs(change.mean())
        strays = np.abs(self.means(change - change.mean(), groups))
        # A tie is as far; the last digits of a sum must not decide. The mean seen counts as one resample.
        return float((1 + (strays >= seen - 1e-12).sum()) / (1 + self.resamples))


def _clusters(values: Any, groups: Groups | None) -> tuple[Any, Any]:
    """Return the sum of the values and the size of each group; without groups, of each value."""
    values = np.asarray(values, dtype=np.float64)
    if groups is None:
        return values, np.ones(len(values), dtype=np.int64)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = np.array([numbers[group] for group in groups])
    return np.bincount(index, weights=values), np.bincount(index)


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
