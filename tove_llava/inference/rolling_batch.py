"""The answers in the making: rows of one batch, which join and leave between two tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tove_llava.inference.generation import Answerer
from tove_llava.inference.prefill import Prefill, Prompt
from tove_llava.inference.replies import Request
from tove_llava.inference.sampling import next_tokens
from tove_llava.inference.sequences import Sequences, has_plain_cache
from tove_llava.inference.vision import Vision


class Batch(ABC):
    """Answers that are generated together.

    Attributes:
        limit: most answers at a time; None where any number can be.
    """

    limit: int | None = None

    def __init__(self, answerer: Answerer, vision: Vision) -> None:
        self.answerer = answerer
        self.vision = vision
        self.rows: list[Request] = []

    @property
    def live(self) -> list[Request]:
        """Those that somebody waits for."""
        return [row for row in self.rows if row.live]

    @abstractmethod
    def join(self, requests: Sequence[Request]) -> None:
        """Take in requests and give each its first token. When it fails, the batch is as it was."""

    @abstractmethod
    def step(self) -> None:
        """One more token for every live row; the others leave. When it fails, only :meth:`abandon` may follow."""

    def abandon(self) -> list[Request]:
        """Forget all rows; returns the live ones."""
        rows, self.rows = self.live, []
        return rows


class Together(Batch):
    """All rows in one batch of :class:`~tove_llava.inference.sequences.Sequences`."""

    def __init__(self, answerer: Answerer, vision: Vision) -> None:
        super().__init__(answerer, vision)
        self._prefill = Prefill(answerer, share=False)
        self._sequences: Sequences | None = None
        self._tokens: Tensor | None = None  # [B] chosen, and not yet given to the model

    @torch.inference_mode()
    def join(self, requests: Sequence[Request]) -> None:
        if not self.live:
            self.abandon()  # what those who have gone hold may be what these need
        features = self.vision.read(requests)
        # With tokens already, where the memory was full in mid-answer.
        prompts = [
            Prompt([*request.prompt, *request.tokens], features=images)
            for request, images in zip(requests, features, strict=True)
        ]
        sequences, logits = self._prefill(prompts)
        tokens = next_tokens(logits, [request.sampling for request in requests])
        kept = [place for place, row in enumerate(self.rows) if row.live]
        rows = [self.rows[place] for place in kept]
        if kept and self._sequences is not None and self._tokens is not None:
            sequences = Sequences.gather([(self._sequences, kept), (sequences, range(len(requests)))])
            tokens = torch.cat([self._tokens[kept], tokens])
        self.rows, self._sequences, self._tokens = [*rows, *requests], sequences, tokens
        self._say(tokens.tolist()[len(rows) :], requests)

    @torch.inference_mode()
    def step(self) -> None:
        self._leave()
        if self._sequences is None or self._tokens is None:
            return
        logits = self._sequences.extend(self.answerer.model, self._tokens[:, None])[:, -1]
        self._tokens = next_tokens(logits, [row.sampling for row in self.rows])
        self._say(self._tokens.tolist(), self.rows)

    def abandon(self) -> list[Request]:
        self._sequences = self._tokens = None
        return super().abandon()

    def _leave(self) -> None:
        """Rows that have ended take no further step: they might leave the positions that the model knows."""
        kept = [place for place, row in enumerate(self.rows) if row.live]
        if not kept:
            self.abandon()
        elif len(kept) < len(self.rows) and self._sequences is not None and self._tokens is not None:
            self._sequences, self._tokens = Sequences.gather([(self._sequences, kept)]), self._tokens[kept]
            self.rows = [self.rows[place] for place in kept]

    def _say(self, tokens: Sequence[int], rows: Sequence[Request]) -> None:
        for row, token in zip(rows, tokens, strict=True):
            if row.live:
                row.take(token, self.answerer.ends)


class OneByOne(Batch):
    """One answer after another by the model's own ``generate``, for caches that cannot be put together anew."""

    limit = 1

    def join(self, requests: Sequence[Request]) -> None:
        self.rows = list(requests)
        try:
            for request, features in zip(requests, self.vision.read(requests), strict=True):
                self.answerer.generate(
                    [request.prompt],
                    features,
                    request.longest,
                    request.sampling.temperature,
                    request.sampling.top_p,
                    streamer=_Listener(request, self.answerer),
                    stop=_Left(request),
                )
                request.finish()
        finally:
            self.rows = []

    def step(self) -> None:
        """All is done in :meth:`join`."""


class _Listener(BaseStreamer):
    """Hands tokens of ``generate`` on."""

    def __init__(self, request: Request, answerer: Answerer) -> None:
        self.request = request
        self.answerer = answerer
        self.heard_prompt = False

    def put(self, value: Tensor) -> None:
        if self.heard_prompt and self.request.live:
            self.request.take(int(value.item()), self.answerer.ends)
        self.heard_prompt = True

    def end(self) -> None:
        """The batch ends the request."""


class _Left(StoppingCriteria):
    """Ends the generation at the next token once nobody waits for more."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), not self.request.live, device=input_ids.device, dtype=torch.bool)


def make_batch(answerer: Answerer, vision: Vision) -> Batch:
    """The way of answering that suits the model."""
    return (Together if has_plain_cache(answerer.model) else OneByOne)(answerer, vision)
