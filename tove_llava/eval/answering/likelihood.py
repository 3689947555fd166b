"""Multiple choice by likelihood: the model's most likely option."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from tove_llava.core.errors import DataError
from tove_llava.eval.answering import Answer, Job, Mode, register_mode
from tove_llava.inference.prefill import Prefill, Prompt
from tove_llava.inference.rolling_batch import Batch, Row
from tove_llava.inference.sequences import Sequences, pad_left


class OptionsBatch(Batch):
    """Questions whose options are scored when they join.

    Attributes:
        logs: log-probabilities of the tokens of each row's options.
    """

    def __init__(self, mode: "_Likelihood") -> None:
        super().__init__(mode.answerer, mode.images)
        self._mode = mode
        self._prefill = Prefill(mode.answerer, mode.share)
        self.logs: dict[Row, list[list[float]]] = {}

    @torch.inference_mode()
    def join(self, rows: Sequence[Any]) -> None:
        options = [(index, ids) for index, row in enumerate(rows) for ids in self._mode.option_ids(row.job)]
        sequences, logits = self._prefill(
            [Prompt(row.prompt, row.image, images) for row, images in zip(rows, self.features(rows), strict=True)]
        )
        first = logits.log_softmax(dim=-1)[[row for row, _ in options], [ids[0] for _, ids in options]]  # [options]
        logs = [[value] for value in first.tolist()]
        long = [index for index, (_, ids) in enumerate(options) if len(ids) > 1]
        for start in range(0, len(long), self._mode.room.size):
            part = long[start : start + self._mode.room.size]
            for index, more in zip(part, self._continued(sequences, [options[each] for each in part]), strict=True):
                logs[index] += more
        self.rows, self.logs = list(rows), {row: [] for row in rows}
        for (index, _), each in zip(options, logs, strict=True):
            self.logs[rows[index]].append(each)
        for row in rows:
            row.finish()

    def _continued(self, sequences: Sequences, options: Sequence[tuple[int, list[int]]]) -> list[list[float]]:
        """Return the log-probabilities of each option's tokens after its first."""
        ids, valid = pad_left([ids[:-1] for _, ids in options], self.answerer.pad_id, self.answerer.device)  # [R, L]
        length = ids.shape[1]
        rows = Sequences.gather([(sequences, [row for row, _ in options])], room=length)
        logits = rows.extend(self.answerer.model, ids, valid, logits_to_keep=length)  # [R, L, V]
        targets, _ = pad_left([ids[1:] for _, ids in options], 0, self.answerer.device)  # [R, L]
        logs: Tensor = logits.log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]  # [R, L]
        return [line[-(len(ids) - 1) :] for line, (_, ids) in zip(logs.tolist(), options, strict=True)]


class _Likelihood(Mode):
    """Answers with the most likely option's letter; metadata holds all scores."""

    needs_options = True
    by_words: ClassVar[bool] = False  # else by the letter
    batch: OptionsBatch

    def make_batch(self) -> Batch:
        self._answer_ids = lru_cache(maxsize=4096)(self.answerer.answer_ids)
        return OptionsBatch(self)

    def answer(self, row: Row) -> Answer:
        job: Job = row.job
        scores = [sum(logs) / (len(logs) if self.by_words else 1) for logs in self.batch.logs[row]]
        found = dict(zip(job.options, scores, strict=True))
        choice = max(found, key=lambda letter: found[letter])  # the first of equals
        shares = torch.tensor(list(found.values()), dtype=torch.float64).softmax(dim=0).tolist()
        metadata = {
            "log_likelihood": {letter: round(value, 6) for letter, value in found.items()},
            "share": {letter: round(value, 6) for letter, value in zip(found, shares, strict=True)},
        }
        return Answer(job.question, choice, metadata)

    def option_ids(self, job: Job) -> list[list[int]]:
        """Return the ids of each option of a question."""
        found = [self._answer_ids(words if self.by_words else letter) for letter, words in job.options.items()]
        if not all(found):
            raise DataError(f"question {job.question.question_id!r}: an option has no words to score")
        return found


@register_mode("likelihood")
class LetterLikelihood(_Likelihood):
    """Scores the probability of an option's letter."""

    help = "the option whose letter is most likely (its log-probability as it is, not normalised)"


@register_mode("likelihood_text")
class TextLikelihood(_Likelihood):
    """Scores the mean probability of an option's tokens, whatever their number."""

    help = "the option whose words are most likely (mean log-probability per token)"
    by_words = True
