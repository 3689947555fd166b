"""Files for the benchmarks' own servers, as LLaVA's scripts write them."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.eval.matching import match
from tove_llava.eval.normalisation import normalise_evalai
from tove_llava.eval.rows import Row, read_jsonl
from tove_llava.eval.score_table import first_ids


@dataclass(frozen=True)
class Submission:
    """A file to send, the number of questions that it answers, and notes: ids that need attention."""

    content: bytes
    count: int
    notes: Mapping[str, list[Any]] = field(default_factory=dict)


class Submitting(ABC):
    """The part of a benchmark that writes answers for a server."""

    #: how the file's name ends
    submission_suffix: ClassVar[str] = ".json"
    #: questions of the whole test set; None where any number is welcome
    submission_size: ClassVar[int | None] = None

    @abstractmethod
    def submission_questions(self, root: Path) -> Path:
        """Return the file that lists the questions of the submission."""

    @abstractmethod
    def submission(self, predictions: Sequence[Mapping[str, Any]], questions: Path | None) -> Submission:
        """Make the submission of these answers.

        Args:
            questions: the benchmark's file of questions; None if it was not given.

        Raises:
            ConfigError: the format needs the questions.
            DataError: the questions cannot be read, no answer belongs to them, or the format cannot do without one.
        """


def normalised_answers(
    predictions: Sequence[Mapping[str, Any]], questions: Path | None, name: str, complete: bool = False
) -> Submission:
    """Make JSON of ``{NAME: ..., "answer": ...}``, in EvalAI's form.

    Args:
        name: the key of a question that the server wants with the answer.
        complete: refuse if an answer is missing; else it is an empty string.
    """
    rows = read_jsonl(known(questions), required=("question_id", name))
    matched = match(predictions, rows)
    if complete:
        require_all(matched.unanswered)
    answers = [
        {name: row[name], "answer": "" if text is None else normalise_evalai(text)}
        for row, text in zip(rows, matched.texts, strict=True)
    ]
    return Submission(json.dumps(answers).encode(), len(rows) - len(matched.unanswered), matched.ids())


def known(questions: Path | None) -> Path:
    """Return the file of questions, or raise ConfigError."""
    if questions is None:
        raise ConfigError("this benchmark's submission needs its file of questions; give --questions")
    return questions


def require_all(unanswered: Sequence[Any]) -> None:
    """Raise DataError with the first ids if answers are missing."""
    if unanswered:
        ids = first_ids(unanswered, 5)
        raise DataError(f"{len(unanswered)} questions have no answer, and the server wants every one: {ids}")


def json_lines(rows: Sequence[Row]) -> bytes:
    """Format rows as JSONL."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
