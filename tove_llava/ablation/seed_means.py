"""Means over seeds, with their spread."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tove_llava.core.errors import ConfigError


def check_scipy() -> None:
    """Raise ConfigError where intervals cannot be computed."""
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise ConfigError("intervals over seeds need scipy: pip install 'tove-llava[analysis]'") from error


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds, its standard deviation, and its 95 % half-width (Student's t).

    One seed has neither (NaN).
    """

    mean: float
    std: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float], *, interval: bool = True) -> "SeedMean":
        """Average over seeds; without ``interval`` the half-width is NaN, and scipy is not needed."""
        count = len(values)
        mean = statistics.fmean(values)
        if count < 2:
            return cls(mean, math.nan, math.nan, count)
        std, half = statistics.stdev(values), math.nan
        if interval:
            check_scipy()
            from scipy.stats import t

            half = float(t.ppf(0.975, count - 1)) * std / math.sqrt(count)
        return cls(mean, std, half, count)

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return self.text(".1f")

    @property
    def signed(self) -> str:
        return self.text("+.1f")

    def text(self, form: str, *, std: bool = False) -> str:
        """Write the mean, and the half-width or the standard deviation."""
        spread = self.std if std else self.half
        return format(self.mean, form) + ("" if math.isnan(spread) else f" ± {format(spread, form.lstrip('+'))}")
