"""Ways to get answers from a model, found by their names.

A mode takes questions when it has room for them and returns answers when they are ready, so that no question waits for
the longest answer of a fixed batch.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tove_llava.core.errors import ConfigError
from tove_llava.core.registry import Registry
from tove_llava.eval.benchmarks import Question
from tove_llava.eval.tasks import Decoding

if TYPE_CHECKING:
    from torch import Tensor

    from tove_llava.inference.generation import Answerer
    from tove_llava.inference.rolling_batch import Batch, Row

# Share of ended answers at which they leave the batch: leaving moves the whole cache.
ENDED = 0.25


@dataclass(frozen=True)
class Job:
    """A question as ids.

    Attributes:
        prompt: ids from :meth:`Answerer.encode`.
        options: letter -> words, for multiple choice.
    """

    question: Question
    prompt: Sequence[int]
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The text to score, and the other fields of the answer line."""

    question: Question
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


Take = Callable[[int], list[Job]]
Features = Callable[[Sequence[Job]], "list[list[Tensor]]"]


class Mode(ABC):
    """One way of answering.

    When the GPU's memory is full, the batch is halved and goes on; questions that were in it are asked again.

    Args:
        features: returns [N, D] of each image of each question.
        capacity: questions in the model at a time.
        share: compute what prompts have in common once, where the mode can.
    """

    needs_options: ClassVar[bool] = False
    help: ClassVar[str] = ""

    def __init__(
        self, answerer: "Answerer", decoding: Decoding, features: Features, capacity: int, share: bool = True
    ) -> None:
        from tove_llava.inference.rolling_batch import Room

        self.answerer = answerer
        self.decoding = decoding
        self.features = features
        self.room = Room(capacity)
        self.share = share
        self.batch = self.make_batch()

    @abstractmethod
    def make_batch(self) -> "Batch":
        """Make the batch that the questions join."""

    @abstractmethod
    def answer(self, row: "Row") -> Answer:
        """Return the answer of a row that has ended."""

    def images(self, rows: "Sequence[Row]") -> "list[list[Tensor]]":
        """Return the features of each row's images."""
        return self.features([row.job for row in rows])

    def run(self, take: Take) -> Iterator[list[Answer]]:
        """Yield answers to ``take(n)``'s questions: at most ``n``, at last none.

        Raises:
            ConfigError: a single question does not fit into the GPU's memory.
        """
        import torch

        waiting: list[Job] = []
        while True:
            try:
                free = self.room.size - len(self.batch.rows)
                if free > len(waiting):
                    waiting += take(free - len(waiting))
                if waiting and free:
                    self.batch.join([self._row(job) for job in waiting[:free]])
                    del waiting[:free]
                rows = self.batch.rows
                if not rows:
                    return
                while sum(row.ended for row in rows) < ENDED * len(rows):
                    self.batch.step()
                answers = [self.answer(row) for row in rows if row.ended]
                self.batch.leave()
            except torch.OutOfMemoryError:
                answers = []  # handled below, where the error no longer holds the tensors of its frames
            if answers:
                yield answers
                continue
            waiting = [row.job for row in self.batch.rows] + waiting
            self.batch.abandon()
            if not self.room.halve(self.room.size):
                raise ConfigError(
                    "the GPU's memory is full with one question at a time; use a smaller --dtype or --max-new-tokens, "
                    "or a GPU with more memory"
                )
            text = f"the GPU's memory is full; going on with {self.room.size} questions at a time"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _row(self, job: Job) -> "Row":
        import random

        from tove_llava.inference.rolling_batch import Row

        return Row(
            prompt=job.prompt,
            decoding=self.decoding,
            longest=min(self.decoding.max_new_tokens, self.answerer.max_length - len(job.prompt)),
            image=job.question.images or None,
            # Its own random numbers, so that no answer depends on the batch, the process or a restart.
            draw=random.Random(str(job.question.key)).random,
            job=job,
        )


MODES: Registry[type[Mode]] = Registry("answering mode", "tove_llava.eval.answering")
register_mode = MODES.register


def get_option_mode(name: str) -> type[Mode]:
    """Return the mode called ``name``, which must score options.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    names = [each for each in MODES if MODES.get(each).needs_options]
    if name not in names:
        raise ConfigError(f"no way of scoring options is called {name!r}. Available: {', '.join(names)}")
    return MODES.get(name)
