"""Benchmarks: one registered file each, with its file layout, prompts, answer length and scorer.

A newcomer adds a file like this (see ``scenes.py``)::

    @register_benchmark("mine")
    class Mine(Benchmark):
        max_new_tokens = 16
        def questions(self, root): ...
        def ground_truth(self, root): ...
        def score(self, predictions, truth): ...
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tove_llava.eval.rows import Row, read_jsonl
from tove_llava.registry import Registry


@dataclass(frozen=True)
class Question:
    """One question as the model gets it: an image (or none) and the user's words, without a placeholder."""

    question_id: int | str
    text: str
    image: Path | None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What a scorer returns.

    Attributes:
        scores: the numbers, nested as the benchmark's official program names them.
        count: questions scored; unanswered ones are among them.
        rows: the report's table, label -> (percent, questions).
        extras: further entries of the JSON output (means, ids that were not answered, ...).
    """

    scores: Mapping[str, Any]
    count: int
    rows: Mapping[str, tuple[float, int]]
    extras: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self, benchmark: str) -> dict[str, Any]:
        """``{"benchmark", "scores", "count", ...extras}``."""
        return {"benchmark": benchmark, "scores": dict(self.scores), "count": self.count, **self.extras}


class Benchmark(ABC):
    """Where a benchmark's files are, what the model is asked, and how its answers are scored.

    ``root`` is the evaluation data root, LLaVA's ``playground/data/eval`` or a folder of playground scenes.
    """

    max_new_tokens: ClassVar[int]

    @abstractmethod
    def question_file(self, root: Path) -> Path:
        """The file whose presence shows that the benchmark's data is under ``root``."""

    @abstractmethod
    def questions(self, root: Path) -> list[Question]:
        """All questions, in file order.

        Raises:
            DataError: a file is missing or malformed; it is named.
        """

    @abstractmethod
    def ground_truth(self, root: Path) -> list[Row]:
        """Rows for :meth:`score`, in the form that :meth:`read_ground_truth` reads from one file."""

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        """Ground truth from a single file, for scoring without a model."""
        return read_jsonl(file, required=("question_id",))

    @abstractmethod
    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        """Score answers; a pure function of its arguments.

        Raises:
            DataError: a row lacks a key, or no prediction belongs to this ground truth.
        """


BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark", "tove_llava.eval.benchmarks")
register_benchmark = BENCHMARKS.register


def get_benchmark(name: str) -> Benchmark:
    """The benchmark called ``name``.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    return BENCHMARKS.get(name)()
