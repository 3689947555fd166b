"""The contract of a benchmark."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.data.images import open_image
from tove_llava.eval.benchmarks import Benchmark, EmbeddedImage, Question, Score, get_benchmark
from tove_llava.testing.contract import Contract, Skip, require


@dataclass
class _Subject:
    benchmark: Benchmark
    root: Path

    @property
    def questions(self) -> list[Question]:
        return self.benchmark.questions(self.root)

    @property
    def truth(self) -> list[Any]:
        rows = self.benchmark.ground_truth(self.root)
        if rows is None:
            raise Skip
        return rows

    def answers(self, text: str) -> list[dict[str, Any]]:
        return [{"question_id": q.question_id, "prompt": q.text, "text": text} for q in self.questions]

    def score(self, answers: list[dict[str, Any]]) -> Score:
        return self.benchmark.score(answers, self.truth)


_contract: Contract[_Subject] = Contract()


def check_benchmark(name: str, root: str | os.PathLike[str], rule: str | None = None) -> list[str]:
    """Check a registered benchmark against its contract, on its data or a sample of them.

    Args:
        name: registered name.
        root: evaluation data root, in which the benchmark finds its files.
        rule: one of the benchmark's scoring rules; its first by default.

    Returns:
        the rules that hold.

    Raises:
        ContractError: rules are broken; each is named, with the benchmark's file and line.
        ConfigError: no benchmark has that name, or a program that it needs is missing.
        DataError: the questions cannot be read.

    Example:
        >>> from tove_llava.testing import check_benchmark
        >>> check_benchmark("scenes", "playground/data/scenes")[0]  # doctest: +SKIP
        'has questions with text, and images that open'
    """
    benchmark = get_benchmark(name, rule)
    benchmark.check_requirements()
    subject = _Subject(benchmark, Path(root))
    subject.benchmark.questions(subject.root)  # files that are not there break no rule
    return _contract.check(lambda: subject, f"benchmark {name!r}", type(benchmark))


@_contract.rule("has questions with text, and images that open")
def _questions(subject: _Subject) -> None:
    require(bool(subject.questions), "no questions")
    for question in subject.questions[:50]:
        require(bool(question.text.strip()), f"question {question.question_id!r} has no text")
        require(question.text.count("<image>") <= 1, f"question {question.question_id!r} holds several placeholders")
        for image in question.images:
            _ = image.open() if isinstance(image, EmbeddedImage) else open_image(image)


@_contract.rule("has a key of its own for each question, and a ground truth for each key")
def _keys(subject: _Subject) -> None:
    keys = [subject.benchmark.question_key(question) for question in subject.questions]
    require(len(set(keys)) == len(keys), "two questions share a key; override answer_key and question_key")
    missing = set(keys) - {subject.benchmark.truth_key(row) for row in subject.truth}
    require(not missing, f"no ground truth for {sorted(map(str, missing))[:3]}")


@_contract.rule("reads the same questions and ground truth twice, in one order")
def _stable(subject: _Subject) -> None:
    require(subject.questions == subject.questions, "the questions differ from one reading to the next")
    require(subject.truth == subject.truth, "the ground truth differs from one reading to the next")


@_contract.rule("says how many tokens an answer may have")
def _decoding(subject: _Subject) -> None:
    require(isinstance(getattr(subject.benchmark, "max_new_tokens", None), int), "max_new_tokens is not set")


@_contract.rule("scores any answers, empty and odd ones too, with JSON and rows in percent")
def _any_answers(subject: _Subject) -> None:
    for text in ("", "Yes", "A", "12", "<think>", "é 猫 🙂", "a long answer " * 50):
        score = subject.score(subject.answers(text))
        json.dumps(score.to_json("x", details=True))
        require(score.count > 0, "a count of zero")
        for label, (percent, count) in score.rows.items():
            require(count >= 0 and percent == percent, f"row {label!r}: {percent} of {count}")
        outside = {key: mark for key, mark in score.marks.items() if not 0 <= mark <= 1}
        require(not outside, f"marks outside 0 to 1: {dict(list(outside.items())[:3])}")


@_contract.rule("scores by nothing but answers and ground truth: their order does not matter")
def _order(subject: _Subject) -> None:
    words = ("Yes", "No", "A", "B", "red")
    answers = [{**row, "text": words[index % 5]} for index, row in enumerate(subject.answers(""))]
    first, second = subject.score(answers), subject.score(answers[::-1])
    require(_close(first.scores, second.scores), f"{dict(first.scores)} and, backwards, {dict(second.scores)}")
    require(_close(subject.score(answers).scores, first.scores), "a second scoring differs")


@_contract.rule("counts a question without an answer, as unanswered")
def _unanswered(subject: _Subject) -> None:
    answers = subject.answers("Yes")
    if len(answers) < 2:
        raise Skip
    score = subject.score(answers[1:])
    require(score.count == subject.score(answers).count, "the count depends on how many answers there are")
    require(bool(score.extras.get("unanswered")), "the answer that is missing is not in the notes; add matched.notes()")


@_contract.rule("refuses answers of another benchmark, and a ground truth that is empty")
def _foreign(subject: _Subject) -> None:
    foreign = [{"question_id": "of-another-benchmark", "prompt": "?", "text": "Yes"}]
    for answers, truth in ((foreign, subject.truth), (subject.answers("Yes"), [])):
        try:
            subject.benchmark.score(answers, truth)
        except DataError:
            continue
        raise AssertionError("scores them; pair answers by self.match(predictions, truth)")


def _close(first: Any, second: Any) -> bool:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_close(first[key], second[key]) for key in first)
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) <= 1e-9 * max(1.0, abs(first))
    return bool(first == second)
