"""Free answers by transformers' own ``generate``, one batch after another.

For beam search, and for language models whose cache is not a plain one (sliding windows), which
:mod:`tove_llava.eval.answering.generate` cannot put together anew.
"""

from collections.abc import Sequence

from tove_llava.eval.answering import Answer, Features, Job, Mode, register_mode
from tove_llava.eval.tasks import Decoding
from tove_llava.inference.generation import Answerer


@register_mode("batches")
class Batches(Mode):
    """The answer is what the model says. Drawn answers (temperature above 0) depend on the batch."""

    help = "the model says its answer, in fixed batches"

    def __init__(
        self, answerer: Answerer, decoding: Decoding, features: Features, capacity: int, share: bool = True
    ) -> None:
        super().__init__(answerer, decoding, features, max(1, capacity // decoding.num_beams), share)
        self.jobs: list[Job] = []

    def busy(self) -> int:
        return len(self.jobs)

    def start(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)

    def abandon(self) -> list[Job]:
        jobs, self.jobs = self.jobs, []
        return jobs

    def work(self) -> list[Answer]:
        features = [found for found in self.features(self.jobs) if found is not None]
        texts = self.answerer.generate(
            [job.prompt for job in self.jobs],
            features,
            self.decoding.max_new_tokens,
            temperature=self.decoding.temperature,
            top_p=self.decoding.top_p,
            num_beams=self.decoding.num_beams,
            min_new_tokens=self.decoding.min_new_tokens,
        )
        return [Answer(job.question, text) for job, text in zip(self.abandon(), texts, strict=True)]
