"""What the benchmarks share whose answers a language model judges."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from tove_llava.eval.benchmarks import Benchmark, Score
from tove_llava.eval.judge import HOW, Judge, OnlyEstimated


class JudgedBenchmark(Benchmark):
    """Scored by a judge; without one the scores are unavailable.

    Attributes:
        judge: who judges; set it before :meth:`score`.
    """

    max_new_tokens = 1024
    judge: Judge | None = None

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)

        def unavailable(reason: str) -> Score:
            return Score({}, len(truth), {}, matched.notes(), unavailable={"scores": reason})

        if self.judge is None:
            return unavailable(f"no judge; {HOW}")
        try:
            score = self.verdicts(self.judge, truth, matched.texts)
        except OnlyEstimated as estimate:
            return unavailable(str(estimate))
        judge = {"model": self.judge.model, "calls": self.judge.calls, "cached": self.judge.cached}
        extras = {**score.extras, **matched.notes(), "judge": judge}
        return Score(score.scores, score.count, score.rows, extras, score.details, score.marks)

    @abstractmethod
    def verdicts(self, judge: Judge, truth: Sequence[Mapping[str, Any]], texts: Sequence[str | None]) -> Score:
        """Have the answers judged and sum up.

        Args:
            texts: the answers in the ground truth's order; None where one is missing.

        Raises:
            ServiceError: the judge cannot be reached, or refuses.
        """
