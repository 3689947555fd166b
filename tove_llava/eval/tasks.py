"""Benchmarks with their data, checked before any model is loaded."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.eval.benchmarks import BENCHMARKS, Benchmark, Question, Score, get_benchmark
from tove_llava.eval.own_questions import SPEC, find_own
from tove_llava.eval.rows import Row

MAKE_SCENES = "tove-llava scenes --out playground/data/scenes --train 8000 --val 300 --seed 0"


@dataclass(frozen=True)
class Decoding:
    """Settings of generation; each benchmark has LLaVA's, and flags override them.

    Attributes:
        max_new_tokens: the longest answer.
        temperature: 0 is greedy; above, tokens are drawn, for each question independently of its batch.
        top_p: draw from the most likely tokens that together have this probability.
        num_beams: above 1, beam search.
        min_new_tokens: the shortest answer; for measuring with answers of a fixed length.
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
        """Return a benchmark's settings with ``overrides`` that are not None."""
        settings = cls(benchmark.max_new_tokens, benchmark.temperature, benchmark.top_p, benchmark.num_beams)
        return replace(settings, **{key: value for key, value in (overrides or {}).items() if value is not None})


@dataclass(frozen=True)
class Task:
    """A benchmark with its data.

    Attributes:
        root: the data root that has it.
        asked: the questions within the limit.
        truth: ground truth of the questions asked; None where it is not public.
    """

    name: str
    benchmark: Benchmark
    root: Path
    decoding: Decoding
    questions: list[Question] = field(repr=False)
    asked: list[Question] = field(repr=False)
    truth: list[Row] | None = field(repr=False)

    @classmethod
    def read(
        cls,
        name: str,
        benchmark: Benchmark,
        root: Path,
        limit: int | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> "Task":
        """Read questions and ground truth.

        Raises:
            ConfigError: an override of the decoding is out of its range.
            DataError: a file is missing or malformed.
        """
        questions = benchmark.questions(root)
        asked = benchmark.limited(questions, limit)
        truth = benchmark.ground_truth(root)
        if truth is not None:
            keys = {benchmark.question_key(question) for question in asked}
            truth = [row for row in truth if benchmark.truth_key(row) in keys]
        return cls(name, benchmark, root, Decoding.of(benchmark, overrides), questions, asked, truth)

    def check(self) -> None:
        """Refuse questions that could not be answered or scored.

        Raises:
            ConfigError: a program is missing.
            DataError: there are no questions, the ground truth is not theirs, or images are missing; they are named.
        """
        self.benchmark.check_requirements()
        if not self.asked:
            raise DataError(f"benchmark {self.name!r} has no questions in {self.benchmark.question_file(self.root)}")
        if self.truth is not None:  # what the scorer would refuse afterwards
            blank = [{"question_id": each.question_id, "prompt": each.text, "text": ""} for each in self.asked]
            self.benchmark.match(blank, self.truth)
        _check_images(self.asked)

    def check_options(self) -> None:
        """Raise ConfigError for a benchmark with a question that has no options."""
        for question in self.asked:
            if not self.benchmark.options(question):
                raise ConfigError(
                    f"--score-options: question {question.question_id!r} of {self.name!r} lists no options (lines such "
                    "as 'A. red'); leave the flag out for this benchmark"
                )

    def score(self, rows: Sequence[Row]) -> Score:
        """Score the answers to the questions asked."""
        if self.truth is not None:
            return self.benchmark.score(rows, self.truth)
        reason = "the answers are not public; 'tove-llava submission' writes the file for the benchmark's server"
        return Score({}, len(rows), {}, unavailable={"all": reason})


def _check_images(questions: Sequence[Question], shown: int = 5) -> None:
    """Raise DataError with the first questions whose image files are missing."""
    there: dict[Path, set[str]] = {}
    lost = []
    for question, image in ((each, image) for each in questions for image in each.images):
        if not isinstance(image, Path):
            continue
        folder = image.parent
        if folder not in there:  # listing a folder is much faster than asking for 100,000 files
            there[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        if image.name not in there[folder]:
            lost.append(f"question {question.question_id!r}: there is no image {image}")
    if lost:
        more = f"\nand {len(lost) - shown} more" if len(lost) > shown else ""
        raise DataError(f"{len(lost)} of {len(questions)} images are missing:\n" + "\n".join(lost[:shown]) + more)


def find_data(benchmarks: str, data_roots: Sequence[str | Path]) -> list[tuple[str, Benchmark, Path]]:
    """Find each benchmark asked for, and the root that has its data.

    Raises:
        ConfigError: an unknown benchmark.
        DataError: no root has the data of a benchmark that was asked for by name, or of any when all were.
    """
    every = benchmarks.strip() == "all"
    own = {file.parent.name for root in data_roots for file in Path(root).glob(f"*/{SPEC}")}
    names = [*BENCHMARKS, *sorted(own)] if every else [name.strip() for name in benchmarks.split(",") if name.strip()]
    if not names:
        raise DataError("no benchmark is named; give --benchmark a name")
    tasks = []
    for name in dict.fromkeys(names):
        if name not in BENCHMARKS and (mine := find_own(name, data_roots)):
            tasks.append(mine)
            continue
        benchmark = get_benchmark(name)
        files = [benchmark.question_file(Path(root)) for root in data_roots]
        found = [Path(root) for root, file in zip(data_roots, files, strict=True) if file.is_file()]
        if found:
            tasks.append((name, benchmark, found[0]))
        elif not every:
            raise DataError(
                f"the data of benchmark {name!r} is not there: no {' and no '.join(map(str, files))}. "
                f"Give --data-root, or make scenes: {MAKE_SCENES}"
            )
    if not tasks:
        raise DataError(f"no benchmark's data is under {', '.join(map(str, data_roots))}; give --data-root")
    return tasks
