"""Files for the benchmarks' own servers and programs, as LLaVA's conversion scripts write them."""

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


@dataclass(frozen=True)
class Submission:
    """A file to send.

    Attributes:
        content: the file.
        notes: ids that need a look (``unanswered``, ``duplicated``, ``unknown``, ...).
    """

    content: bytes
    notes: Mapping[str, list[Any]] = field(default_factory=dict)


class Submitting(ABC):
    """What a benchmark adds whose answers another program scores."""

    #: how the file's name ends
    submission_suffix: ClassVar[str] = ".json"

    @abstractmethod
    def submission_questions(self, root: Path) -> Path:
        """The file that says which answers belong into the submission."""

    @abstractmethod
    def submission(self, predictions: Sequence[Mapping[str, Any]], questions: Path | None) -> Submission:
        """The submission of these answers.

        Args:
            questions: the benchmark's file of questions; None where it is not at hand.

        Raises:
            ConfigError: the format needs the questions.
            DataError: the questions cannot be read, no answer belongs to them, or the format cannot do without one.
        """


def normalised_answers(
    predictions: Sequence[Mapping[str, Any]], questions: Path | None, name: str, complete: bool = False
) -> Submission:
    """A JSON list of ``{NAME: ..., "answer": ...}`` in the questions' order, answers in the EvalAI form.

    Args:
        name: the key of a question that the server wants beside the answer.
        complete: refuse where an answer is missing; else it is an empty string.

    Raises:
        DataError: an answer is missing that must not be, or none belongs to the questions.
    """
    rows = read_jsonl(known(questions), required=("question_id", name))
    matched = match(predictions, rows)
    if complete:
        require_all(matched.unanswered)
    answers = [
        {name: row[name], "answer": "" if text is None else normalise_evalai(text)}
        for row, text in zip(rows, matched.texts, strict=True)
    ]
    return Submission(json.dumps(answers).encode(), matched.notes())


def known(questions: Path | None) -> Path:
    """The file of questions.

    Raises:
        ConfigError: there is none.
    """
    if questions is None:
        raise ConfigError("this benchmark's submission needs its file of questions; give --questions")
    return questions


def require_all(unanswered: Sequence[Any]) -> None:
    """Refuse a submission whose format has no place for a missing answer.

    Raises:
        DataError: there is one; the first ids are named.
    """
    if unanswered:
        ids = ", ".join(map(str, unanswered[:5])) + (", ..." if len(unanswered) > 5 else "")
        raise DataError(f"{len(unanswered)} questions have no answer, and the server wants every one: {ids}")


def json_lines(rows: Sequence[Row]) -> bytes:
    """JSONL."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
