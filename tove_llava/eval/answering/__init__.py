"""Ways of getting an answer out of a model: one registered file each.

A mode takes questions as it has room for them and hands out answers as they are ready, so that no question waits for
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


@dataclass(frozen=True)
class Job:
    """A question in the model's terms.

    Attributes:
        prompt: ids from :meth:`Answerer.encode`.
        options: letter -> words, for multiple choice.
    """

    question: Question
    prompt: Sequence[int]
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The text to score, and what else the answer line records."""

    question: Question
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


Take = Callable[[int], list[Job]]
Features = Callable[[Sequence[Job]], "list[Tensor | None]"]


class Mode(ABC):
    """One way of answering.

    When the GPU's memory is full, the batch is halved and goes on; questions that were in it are asked again.

    Args:
        features: gives [N, D] of each question's picture, None for those without.
        capacity: questions in the model at a time.
        share: compute what prompts have in common once, where the mode can.
    """

    needs_options: ClassVar[bool] = False
    help: ClassVar[str] = ""

    def __init__(
        self, answerer: "Answerer", decoding: Decoding, features: Features, capacity: int, share: bool = True
    ) -> None:
        self.answerer = answerer
        self.decoding = decoding
        self.features = features
        self.capacity = capacity
        self.share = share
        self.waiting: list[Job] = []

    @abstractmethod
    def busy(self) -> int:
        """Questions in the model now."""

    @abstractmethod
    def start(self, jobs: Sequence[Job]) -> None:
        """Take in questions, at most ``capacity - busy()``."""

    @abstractmethod
    def work(self) -> list[Answer]:
        """Compute until some answers are ready."""

    @abstractmethod
    def abandon(self) -> list[Job]:
        """Forget the questions in the model and return them."""

    def run(self, take: Take) -> Iterator[list[Answer]]:
        """Answers of all questions that ``take(n)`` gives (at most ``n`` a call; none when there are no more).

        Raises:
            ConfigError: a single question does not fit into the GPU's memory.
        """
        import torch

        while True:
            answers: list[Answer] | None = None
            try:
                self._fill(take)
                if not self.busy():
                    return
                answers = self.work()
            except torch.OutOfMemoryError:
                pass  # handled below, where the error no longer holds the tensors of its frames
            if answers is None:
                self._shrink()
            else:
                yield answers

    def _fill(self, take: Take) -> None:
        room = self.capacity - self.busy()
        if room > len(self.waiting):
            self.waiting += take(room - len(self.waiting))
        jobs = self.waiting[:room]
        if jobs:
            self.start(jobs)
            self.waiting = self.waiting[len(jobs) :]

    def _shrink(self) -> None:
        import torch

        self.waiting = self.abandon() + self.waiting
        if self.capacity == 1:
            raise ConfigError(
                "the GPU's memory is full with one question at a time; use a smaller --dtype or --max-new-tokens, or a "
                "GPU with more memory"
            )
        self.capacity //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"the GPU's memory is full; going on with {self.capacity} questions at a time", RuntimeWarning, stacklevel=2
        )


MODES: Registry[type[Mode]] = Registry("answering mode", "tove_llava.eval.answering")
register_mode = MODES.register


def get_option_mode(name: str) -> type[Mode]:
    """The mode called ``name``, which must score options.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    names = [each for each in MODES if MODES.get(each).needs_options]
    if name not in names:
        raise ConfigError(f"no way of scoring options is called {name!r}. Available: {', '.join(names)}")
    return MODES.get(name)
