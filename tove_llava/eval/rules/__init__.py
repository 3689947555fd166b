"""Rules that compare one answer with the right one: one registered file each.

Your own questions name a rule (``tove-llava eval --questions FILE --rule NAME``). Benchmarks that share one stand on it
(:class:`MarkedBenchmark`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tove_llava.core.errors import ConfigError
from tove_llava.core.registry import Registry
from tove_llava.eval.benchmarks import SHORT_ANSWER, Benchmark, Score
from tove_llava.eval.matching import Matched
from tove_llava.inference.reasoning import spoken


class Rule(ABC):
    """A rule without state; rows have ``answers``, and ``options`` (letter -> words) where there are any."""

    #: what a prompt ends with, so that answers have the form that the rule reads
    request: ClassVar[str] = SHORT_ANSWER
    #: right answers that a question needs
    least_answers: ClassVar[int] = 1
    needs_options: ClassVar[bool] = False

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        """Tell if an answer has a form that the rule reads, right or wrong."""
        return bool(text.strip())

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a row's right answers, if anything."""
        return None

    @abstractmethod
    def mark(self, row: Mapping[str, Any], text: str) -> float:
        """Return an answer's mark, 0 to 1."""


RULES: Registry[type[Rule]] = Registry("rule", "tove_llava.eval.rules")
register_rule = RULES.register


class MarkedBenchmark(Benchmark):
    """Questions whose score is the mean of their marks by :attr:`marking`, overall and by category."""

    marking: Rule

    def known(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a row with its right ``answers``."""
        return row

    def heard(self, text: str) -> str:
        """Return the part of an answer that the rule reads."""
        return spoken(text).answer

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return self.marking.is_readable(self.known(row), self.heard(text))

    def mark(self, row: Mapping[str, Any], text: str) -> float:
        """Return an answer's mark, 0 to 1."""
        return self.marking.mark(self.known(row), self.heard(text))

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        marks = {
            row["question_id"]: 0.0 if text is None else self.mark(row, text)
            for row, text in zip(truth, matched.texts, strict=True)
        }
        return self.summary(marks, truth, matched)

    def summary(self, marks: Mapping[Any, float], truth: Sequence[Mapping[str, Any]], matched: Matched) -> Score:
        """Return the score of marks, by question id in the order of ``truth``."""
        groups: dict[str, list[float]] = {}
        for row in truth:
            if row.get("category"):
                groups.setdefault(row["category"], []).append(marks[row["question_id"]])
        scores: dict[str, Any] = {
            name: {"accuracy": sum(groups[name]) / len(groups[name]), "samples": len(groups[name])}
            for name in sorted(groups)
        }
        scores["overall"] = {"accuracy": sum(marks.values()) / len(marks), "samples": len(marks)}
        rows = {name: (100 * entry["accuracy"], entry["samples"]) for name, entry in scores.items()}
        return Score(scores, len(marks), rows, matched.notes(), {"per_item": dict(marks)}, marks, rule=self.rule)


def get_rule(name: str) -> Rule:
    """Return the rule called ``name``.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    if name not in RULES:
        raise ConfigError(f"unknown rule {name!r}; rules: {', '.join(RULES)}, caption, judge")
    return RULES.get(name)()
