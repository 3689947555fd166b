"""How answers are decoded: each benchmark has LLaVA's settings as data, and flags override them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tove_llava.core.errors import ConfigError
from tove_llava.eval.benchmarks import Benchmark


@dataclass(frozen=True)
class Decoding:
    """Settings of one benchmark.

    Attributes:
        max_new_tokens: an answer's length at most.
        temperature: 0 is greedy; above, words are drawn, the same ones for a question whatever stands beside it.
        top_p: draw from the most likely words that together have this probability.
        num_beams: above 1, beam search.
        min_new_tokens: do not end an answer before; for measuring with answers of a fixed length.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "min_new_tokens": (self.min_new_tokens <= self.max_new_tokens, "at most max_new_tokens"),
        }
        for name, (right, allowed) in rules.items():
            if not right:
                raise ConfigError(f"{name} must be {allowed}, not {getattr(self, name)}")
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError("beam search is done at temperature 0; give --num-beams or --temperature, not both")

    @classmethod
    def of(cls, benchmark: Benchmark, overrides: Mapping[str, Any] | None = None) -> "Decoding":
        """A benchmark's settings; entries of ``overrides`` that are not None take their place.

        Raises:
            ConfigError: a number out of its range.
        """
        settings = cls(benchmark.max_new_tokens, benchmark.temperature, benchmark.top_p, benchmark.num_beams)
        return replace(settings, **{key: value for key, value in (overrides or {}).items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
