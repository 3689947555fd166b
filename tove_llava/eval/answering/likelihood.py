"""Multiple choice by likelihood: the option that the model would most likely say."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tove_llava.core.errors import DataError
from tove_llava.eval.answering import Answer, Features, Job, Mode, register_mode
from tove_llava.eval.tasks import Decoding
from tove_llava.inference.generation import Answerer
from tove_llava.inference.prefill import Prefill, Prompt, pad_left
from tove_llava.inference.sequences import Sequences


class _Likelihood(Mode):
    """The answer is the letter of the most likely option; the line's metadata has the scores of all of them."""

    needs_options = True

    def __init__(
        self, answerer: Answerer, decoding: Decoding, features: Features, capacity: int, share: bool = True
    ) -> None:
        super().__init__(answerer, decoding, features, capacity, share)
        self.prefill = Prefill(answerer, share)
        self.jobs: list[Job] = []
        self.ids = lru_cache(maxsize=4096)(answerer.answer_ids)

    @staticmethod
    @abstractmethod
    def said(letter: str, words: str) -> str:
        """What the model is taken to say for an option."""

    @staticmethod
    @abstractmethod
    def score(logs: Sequence[float]) -> float:
        """An option's score, from the log-probabilities of its tokens."""

    def busy(self) -> int:
        return len(self.jobs)

    def start(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)

    def abandon(self) -> list[Job]:
        jobs, self.jobs = self.jobs, []
        return jobs

    @torch.inference_mode()
    def work(self) -> list[Answer]:
        options = [(row, self._ids(job)) for row, job in enumerate(self.jobs)]
        flat = [(row, ids) for row, each in options for ids in each]
        scores = iter([self.score(logs) for logs in self._logs(flat)])
        answers = []
        for job in self.abandon():
            found = {letter: next(scores) for letter in job.options}
            choice = max(found, key=lambda letter: found[letter])  # the first of equals
            shares = torch.tensor(list(found.values()), dtype=torch.float64).softmax(dim=0).tolist()
            metadata = {
                "log_likelihood": {letter: round(value, 6) for letter, value in found.items()},
                "share": {letter: round(value, 6) for letter, value in zip(found, shares, strict=True)},
            }
            answers.append(Answer(job.question, choice, metadata))
        return answers

    def _ids(self, job: Job) -> list[list[int]]:
        found = [self.ids(self.said(letter, words)) for letter, words in job.options.items()]
        if not all(found):
            raise DataError(f"question {job.question.question_id!r}: an option has no words to score")
        return found

    def _logs(self, options: Sequence[tuple[int, list[int]]]) -> list[list[float]]:
        """Log-probability of each token of each option, which is given with its question's row."""
        features = self.features(self.jobs)
        prompts = [
            Prompt(job.prompt, job.question.image, found) for job, found in zip(self.jobs, features, strict=True)
        ]
        sequences, logits = self.prefill(prompts)
        first = logits.log_softmax(dim=-1)[[row for row, _ in options], [ids[0] for _, ids in options]]  # [options]
        logs = [[value] for value in first.tolist()]
        long = [place for place, (_, ids) in enumerate(options) if len(ids) > 1]
        for start in range(0, len(long), self.capacity):
            places = long[start : start + self.capacity]
            for place, more in zip(
                places, self._continued(sequences, [options[place] for place in places]), strict=True
            ):
                logs[place] += more
        return logs

    def _continued(self, sequences: Sequences, options: Sequence[tuple[int, list[int]]]) -> list[list[float]]:
        """Log-probabilities of each option's tokens after its first; the prompts are not computed again."""
        ids, valid = pad_left([ids[:-1] for _, ids in options], self.answerer.pad_id, self.answerer.device)  # [R, L]
        length = ids.shape[1]
        rows = Sequences.gather([(sequences, [row for row, _ in options])], room=length)
        logits = rows.extend(self.answerer.model, ids, valid, logits_to_keep=length)  # [R, L, V]
        targets, _ = pad_left([ids[1:] for _, ids in options], 0, self.answerer.device)  # [R, L]
        logs: Tensor = logits.log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]  # [R, L]
        return [line[-(len(ids) - 1) :] for line, (_, ids) in zip(logs.tolist(), options, strict=True)]


@register_mode("likelihood")
class LetterLikelihood(_Likelihood):
    """By the probability of the option's letter."""

    help = "the option whose letter is most likely (its log-probability as it is, not normalised)"

    @staticmethod
    def said(letter: str, words: str) -> str:
        return letter

    @staticmethod
    def score(logs: Sequence[float]) -> float:
        return sum(logs)


@register_mode("likelihood_text")
class TextLikelihood(_Likelihood):
    """By the probability of the option's words, per token: long options are at no disadvantage."""

    help = "the option whose words are most likely (mean log-probability per token)"

    @staticmethod
    def said(letter: str, words: str) -> str:
        return words

    @staticmethod
    def score(logs: Sequence[float]) -> float:
        return sum(logs) / len(logs)
