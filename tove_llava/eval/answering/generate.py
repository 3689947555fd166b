"""Free answers, generated. Rows that have ended leave the batch, and waiting questions take their place."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tove_llava.eval.answering import Answer, Features, Job, Mode, register_mode
from tove_llava.eval.tasks import Decoding
from tove_llava.inference.generation import Answerer
from tove_llava.inference.prefill import Prefill, Prompt
from tove_llava.inference.sampling import drawn, warped
from tove_llava.inference.sequences import Sequences

# A batch is put together anew when this share of its rows has ended: each time moves the whole cache.
ENDED = 0.25


@dataclass
class _Row:
    """An answer in the making."""

    job: Job
    longest: int
    draws: random.Random
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@register_mode("generate")
class Generate(Mode):
    """The answer is what the model says: greedy, or drawn when the temperature is above 0."""

    help = "the model says its answer"

    def __init__(
        self, answerer: Answerer, decoding: Decoding, features: Features, capacity: int, share: bool = True
    ) -> None:
        super().__init__(answerer, decoding, features, capacity, share)
        self.prefill = Prefill(answerer, share)
        self.ends = torch.tensor(answerer.end_ids, device=answerer.device)
        self.abandon()

    def busy(self) -> int:
        return len(self.rows)

    def abandon(self) -> list[Job]:
        jobs = [row.job for row in getattr(self, "rows", [])]
        self.rows: list[_Row] = []
        self.sequences: Sequences | None = None
        self.tokens: Tensor | None = None  # [B] chosen, and not yet given to the model
        return jobs

    @torch.inference_mode()
    def start(self, jobs: Sequence[Job]) -> None:
        features = self.features(jobs)
        sequences, logits = self.prefill(
            [Prompt(job.prompt, job.question.image, found) for job, found in zip(jobs, features, strict=True)]
        )
        rows = [self._row(job) for job in jobs]
        tokens = self._next(rows, logits)
        if self.sequences is not None and self.tokens is not None:
            sequences = Sequences.gather([(self.sequences, range(len(self.rows))), (sequences, range(len(rows)))])
            tokens = torch.cat([self.tokens, tokens])
        self.rows, self.sequences, self.tokens = self.rows + rows, sequences, tokens

    def _row(self, job: Job) -> _Row:
        room = self.answerer.max_length - len(job.prompt)
        # Its own source of chance: what is drawn does not depend on the batch, the process or a restart.
        return _Row(job, min(self.decoding.max_new_tokens, room), random.Random(str(job.question.key)))

    @torch.inference_mode()
    def work(self) -> list[Answer]:
        assert self.sequences is not None and self.tokens is not None
        while sum(row.ended for row in self.rows) < ENDED * len(self.rows):
            logits = self.sequences.extend(self.answerer.model, self.tokens[:, None])[:, -1]
            self.tokens = self._next(self.rows, logits)
        answers = [Answer(row.job.question, self.answerer.text(row.tokens)) for row in self.rows if row.ended]
        kept = [place for place, row in enumerate(self.rows) if not row.ended]
        if kept:
            sequences, tokens = Sequences.gather([(self.sequences, kept)]), self.tokens[kept]
            self.rows, self.sequences, self.tokens = [self.rows[place] for place in kept], sequences, tokens
        else:
            self.abandon()
        return answers

    def _next(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        """[B] next tokens, which the rows record."""
        tokens = self._choose(rows, logits)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not row.ended:
                row.tokens.append(token)
                row.ended = len(row.tokens) >= row.longest or self.answerer.ends(token)
        return tokens

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        if self.decoding.min_new_tokens:
            early = [len(row.tokens) < self.decoding.min_new_tokens for row in rows]
            hold = torch.tensor(early, device=logits.device)[:, None]  # [B, 1]
            barred = torch.zeros_like(logits, dtype=torch.bool).index_fill_(1, self.ends, True)
            logits = logits.masked_fill(barred & hold, -torch.inf)
        if not self.decoding.temperature:
            return logits.argmax(dim=-1)
        logits = warped(logits, self.decoding.temperature, self.decoding.top_p)
        return drawn(logits, [row.draws.random() for row in rows])
