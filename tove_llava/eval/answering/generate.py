"""Free answers, from a rolling batch or transformers' own ``generate``."""

from tove_llava.eval.answering import Answer, Mode, register_mode
from tove_llava.inference.rolling_batch import Batch, RollingBatch, Room, Row, SequentialBatch


@register_mode("generate")
class Generate(Mode):
    """Gives free answers, greedy or (temperature above 0) drawn."""

    help = "the model says its answer"

    def make_batch(self) -> Batch:
        return RollingBatch(self.answerer, self.images, self.share)

    def answer(self, row: Row) -> Answer:
        found = self.answerer.spoken(row.tokens)
        thought = {} if found.reasoning is None else {"reasoning": found.reasoning, "reasoning_closed": found.closed}
        return Answer(row.job.question, found.answer, thought)


@register_mode("batches")
class Batches(Generate):
    """Runs fixed batches (beams, sliding windows); drawn answers depend on the batch."""

    help = "the model says its answer, in fixed batches"

    def make_batch(self) -> Batch:
        self.room = Room(max(1, self.room.size // self.decoding.num_beams))
        return SequentialBatch(self.answerer, self.images, self.decoding.num_beams)
