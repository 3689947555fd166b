"""The pairing of answers with questions."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from tove_llava.core.errors import DataError


@dataclass(frozen=True)
class Matched:
    """Answers paired with questions.

    Attributes:
        answers: for every row of the ground truth the row that answers it, or None.
        unanswered: ids of questions without an answer.
        duplicated: ids with more than one answer, of which the last counts.
        unknown: ids in the predictions that the ground truth does not have.
        unparsed: ids whose answer has no form that the benchmark's rule reads.
    """

    answers: list[Mapping[str, Any] | None]
    unanswered: list[Any]
    duplicated: list[Any]
    unknown: list[Any]
    unparsed: list[Any] = field(default_factory=list)

    @property
    def texts(self) -> list[str | None]:
        """Return the answers' texts."""
        return [None if row is None else row["text"] for row in self.answers]

    def notes(self) -> dict[str, Any]:
        """Return a report's entries about the pairing, and the answers that could not be read."""
        return {**self.ids(), "unparsed": len(self.unparsed), "unparsed_ids": self.unparsed}

    def ids(self) -> dict[str, list[Any]]:
        """Return the ids that need attention whatever the rule."""
        return {"unanswered": self.unanswered, "duplicated": self.duplicated, "unknown": self.unknown}


def match(
    predictions: Sequence[Mapping[str, Any]],
    truth: Sequence[Mapping[str, Any]],
    answer_key: Callable[[Mapping[str, Any]], Hashable] = itemgetter("question_id"),
    truth_key: Callable[[Mapping[str, Any]], Hashable] = itemgetter("question_id"),
) -> Matched:
    """Pair answers with questions.

    Raises:
        DataError: there is no question, one occurs twice, or no prediction answers any of them.
    """
    if not truth:
        raise DataError("the ground truth holds no questions")
    for row in truth:
        if not isinstance(row.get("question_id"), int | str):
            raise DataError(f"the ground truth has a question_id that is no number and no string: {row!r:.200}")
    keys = [truth_key(row) for row in truth]
    known = set(keys)
    if len(known) != len(keys):
        ((twice, _),) = Counter(keys).most_common(1)
        raise DataError(f"the ground truth has question {twice!r} twice; is the file whole?")
    answers: dict[Hashable, Mapping[str, Any]] = {}
    duplicated: dict[Any, None] = {}
    unknown: dict[Any, None] = {}
    for row in predictions:
        key = answer_key(row)
        if key not in known:
            unknown[row["question_id"]] = None
            continue
        if key in answers:
            duplicated[row["question_id"]] = None
        answers[key] = row
    if not answers:
        raise DataError(
            "none of the predictions answers a question of this ground truth: is it another benchmark's? "
            f"(first ids: {next(iter(unknown), None)!r} and {truth[0]['question_id']!r})"
        )
    unanswered = [row["question_id"] for row, key in zip(truth, keys, strict=True) if key not in answers]
    return Matched([answers.get(key) for key in keys], unanswered, list(duplicated), list(unknown))
