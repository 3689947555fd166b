"""Batches of answers: rolling ones, and those of the model's ``generate``."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from tove_llava.inference.generation import Answerer
from tove_llava.inference.prefill import Prefill, Prompt
from tove_llava.inference.sampling import drawn, warped
from tove_llava.inference.sequences import Sequences

CALM = 16  # answers that end without full memory before the batch may grow by one


@dataclass(eq=False, kw_only=True)
class Row:
    """An answer in the making.

    Attributes:
        prompt: ids, with the tokens of each image in place.
        decoding: has ``temperature`` (0 takes the most likely token), ``top_p`` and ``min_new_tokens``.
        longest: number of tokens after which the answer ends.
        image: equal for rows about the same image, so that they can share its computation.
        draw: gives numbers in [0, 1), one for each token that is drawn.
        job: the caller's own.
    """

    prompt: Sequence[int]
    decoding: Any
    longest: int
    image: Hashable = None
    draw: Callable[[], float] = random.random
    job: Any = None
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def live(self) -> bool:
        """Tell if the answer goes on."""
        return not self.ended

    def take(self, token: int, ends: Callable[[int], bool]) -> None:
        """Append the next token of the answer."""
        self.tokens.append(token)
        if len(self.tokens) >= self.longest or ends(token):
            self.finish()

    def finish(self) -> None:
        """End the answer."""
        self.ended = True


class Room:
    """Counts how many answers fit into memory (``size``), at first ``most``."""

    def __init__(self, most: int) -> None:
        self.size = self._most = most
        self._ended = 0

    def halve(self, running: int) -> bool:
        """Halve ``running`` answers that filled the memory; return False for one."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if running > 1:
            self.size, self._ended = running // 2, 0
        return running != 1

    def grow(self, ended: int) -> None:
        """Count ended answers; allow one more after enough of them."""
        self._ended += ended
        if self._ended >= CALM and self.size < self._most:
            self.size, self._ended = self.size + 1, 0


Features = Callable[[Sequence[Any]], Sequence[Sequence[Tensor]]]


class Batch(ABC):
    """Answers that are generated together; ``features`` returns each row's [N, D]."""

    limit: int | None = None  # most answers at a time

    def __init__(self, answerer: Answerer, features: Features) -> None:
        self.answerer = answerer
        self.features = features
        self.rows: list[Any] = []

    @property
    def live(self) -> list[Any]:
        """Return the rows that go on."""
        return [row for row in self.rows if row.live]

    @abstractmethod
    def join(self, rows: Sequence[Any]) -> None:
        """Take in rows with their first tokens; a failure changes nothing."""

    def step(self) -> None:  # noqa: B027 - some batches have all tokens once they have joined
        """Extend every row by a token; after failure only :meth:`abandon` works."""

    def leave(self) -> None:
        """Take out the rows that do not go on."""
        self.rows = self.live

    def abandon(self) -> list[Any]:
        """Take out all rows and return those that could go on."""
        rows, self.rows = self.live, []
        return rows


class RollingBatch(Batch):
    """A batch that sequences join and leave; ``share`` as in :class:`Prefill`."""

    def __init__(self, answerer: Answerer, features: Features, share: bool = False) -> None:
        super().__init__(answerer, features)
        self._prefill = Prefill(answerer, share)
        self._sequences: Sequences | None = None
        self._tokens: Tensor | None = None  # [B] chosen, and not yet given to the model

    @torch.inference_mode()
    def join(self, rows: Sequence[Any]) -> None:
        if not self.live:
            self.abandon()  # the new rows may need the memory
        # A row already has tokens when the memory was full in mid-answer.
        sequences, logits = self._prefill(
            [
                Prompt([*row.prompt, *row.tokens], row.image, images)
                for row, images in zip(rows, self.features(rows), strict=True)
            ]
        )
        tokens = next_tokens(logits, rows, self.answerer.end_ids)
        kept = self._kept()
        if kept and self._sequences is not None and self._tokens is not None:
            sequences = Sequences.gather([(self._sequences, kept), (sequences, range(len(rows)))])
            tokens = torch.cat([self._tokens[kept], tokens])
        self.rows = [*(self.rows[index] for index in kept), *rows]
        self._sequences, self._tokens = sequences, tokens
        self._take(rows)

    @torch.inference_mode()
    def step(self) -> None:
        if self._sequences is None or self._tokens is None:
            return
        logits = self._sequences.extend(self.answerer.model, self._tokens[:, None])[:, -1]
        self._tokens = next_tokens(logits, self.rows, self.answerer.end_ids)
        self._take(self.rows)

    def leave(self) -> None:
        kept = self._kept()
        if not kept:
            self.abandon()
        elif len(kept) < len(self.rows) and self._sequences is not None and self._tokens is not None:
            self._sequences, self._tokens = Sequences.gather([(self._sequences, kept)]), self._tokens[kept]
            self.rows = [self.rows[index] for index in kept]

    def abandon(self) -> list[Any]:
        rows = self.live
        self.rows, self._sequences, self._tokens = [], None, None
        return rows

    def _kept(self) -> list[int]:
        # Asked once for each change of the batch: a reader may go away at any time.
        return [index for index, row in enumerate(self.rows) if row.live]

    def _take(self, rows: Sequence[Any]) -> None:
        """Hand the chosen tokens to the last rows of the batch."""
        assert self._tokens is not None
        for row, token in zip(rows, self._tokens[-len(rows) :].tolist(), strict=True):
            if row.live:
                row.take(token, self.answerer.ends)


class SequentialBatch(Batch):
    """One fixed batch after another, for beams and sliding windows."""

    limit = 1

    def __init__(self, answerer: Answerer, features: Features, num_beams: int = 1) -> None:
        super().__init__(answerer, features)
        self._num_beams = num_beams

    def join(self, rows: Sequence[Any]) -> None:
        self.rows = list(rows)
        decoding = rows[0].decoding
        if (seed := getattr(decoding, "seed", None)) is not None:  # ``generate`` draws by torch's generator
            torch.manual_seed(seed % 2**63)
        try:
            found = self.answerer.generate_ids(
                [row.prompt for row in rows],
                [image for images in self.features(rows) for image in images],
                max(row.longest for row in rows),
                decoding.temperature,
                decoding.top_p,
                stop=None if self._num_beams > 1 else _Listener(rows, self.answerer.ends),
                num_beams=self._num_beams,
                min_new_tokens=decoding.min_new_tokens,
            )
        except BaseException:
            self.rows = []
            raise
        for row, tokens in zip(rows, found, strict=True):
            for token in tokens[len(row.tokens) :]:
                if row.live:
                    row.take(token, self.answerer.ends)
            row.finish()


class _Listener(StoppingCriteria):
    """Passes on the tokens of ``generate``, and ends rows that stop."""

    def __init__(self, rows: Sequence[Any], ends: Callable[[int], bool]) -> None:
        self.rows = rows
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.live:
                row.take(token, self.ends)
        return torch.tensor([not row.live for row in self.rows], device=input_ids.device)


def next_tokens(logits: Tensor, rows: Sequence[Any], end_ids: Sequence[int]) -> Tensor:
    """Choose the next token [B] of each row from float32 [B, V].

    Args:
        end_ids: tokens that no answer may have before its ``min_new_tokens``.
    """
    early = [index for index, row in enumerate(rows) if len(row.tokens) < row.decoding.min_new_tokens]
    if early:
        logits = logits.clone()
        logits[torch.tensor(early)[:, None], torch.tensor(end_ids)] = -torch.inf
    tokens = logits.argmax(dim=-1)
    groups: dict[tuple[float, float], list[int]] = {}
    for index, row in enumerate(rows):
        if row.decoding.temperature:
            groups.setdefault((row.decoding.temperature, row.decoding.top_p), []).append(index)
    for (temperature, top_p), indices in groups.items():
        draws = [rows[index].draw() for index in indices]
        tokens[indices] = drawn(warped(logits[indices], temperature, top_p), draws)
    return tokens
