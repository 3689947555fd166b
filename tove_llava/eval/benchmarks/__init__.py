"""Benchmarks: one registered file each, with layout, prompts and scorer.

A newcomer adds a file like this (see ``playground_scenes.py``)::

    @register_benchmark("mine")
    class Mine(Benchmark):
        question_path = "mine/questions.jsonl"
        image_folder = "mine/images"
        max_new_tokens = 16
        def score(self, predictions, truth): ...
"""

import base64
import binascii
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.paths import name_inside
from tove_llava.core.registry import Registry
from tove_llava.eval.fields import ID, TEXT
from tove_llava.eval.matching import Matched, match
from tove_llava.eval.rows import Row, read_jsonl, read_truth, spread

if TYPE_CHECKING:
    from PIL import Image

SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."

_OPTION_LINE = re.compile(r"^([A-Z])\. ?(.*)$")  # "B. a red ball"
_INLINE_OPTION = re.compile(r"\(([A-Z])\) (.*?)(?= \([A-Z]\) |\n|$)")  # "(A) blue (B) red"


@dataclass(frozen=True)
class EmbeddedImage:
    """An image in base64 text, or in bytes or a buffer; ``name`` identifies it in messages and fingerprints."""

    name: str
    data: Any = field(repr=False, compare=False)

    def open(self) -> "Image.Image":
        """Decode the image.

        Raises:
            DataError: it is not base64, not an image, damaged, or too large.
        """
        from tove_llava.data.images import open_image

        if not isinstance(self.data, str):
            return open_image(self.data, name=f"image {self.name}")
        try:
            content = base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"image {self.name} is not base64 text ({error}); is the file whole?") from error
        return open_image(io.BytesIO(content), name=f"image {self.name}")


@dataclass(frozen=True)
class Question:
    """A question: an image (or none, or several) and words, without a placeholder."""

    question_id: int | str
    text: str
    image: Path | EmbeddedImage | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    more_images: tuple[Path | EmbeddedImage, ...] = ()

    @property
    def images(self) -> tuple[Path | EmbeddedImage, ...]:
        """Return all images, in the order in which the model sees them."""
        return () if self.image is None else (self.image, *self.more_images)

    @property
    def image_names(self) -> Any:
        """Return the image's name, None without one, and a list of several."""
        names = [image.name for image in self.images]
        return names if self.more_images else next(iter(names), None)

    @property
    def key(self) -> tuple[int | str, str]:
        """Identify the question; in some benchmarks two share an id."""
        return self.question_id, self.text


@dataclass(frozen=True)
class Score:
    """A scorer's result.

    Attributes:
        scores: the numbers, nested as the benchmark's official program names them.
        count: questions scored, unanswered ones included.
        rows: the report's table, label -> (percent, questions).
        extras: further entries of the JSON output (means, ids that were not answered, ...).
        details: entries of the JSON output that are as long as the files (``per_item`` and the like), on request.
        marks: each question's mark, 0 to 1, by :meth:`Benchmark.mark_name`; empty where the score is no mean over
            questions.
        unavailable: metrics that cannot be computed here, with the reason.
        rule: the published reading of the rule that was used, if there are several.
    """

    scores: Mapping[str, Any]
    count: int
    rows: Mapping[str, tuple[float, int]]
    extras: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    marks: Mapping[Any, float] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    rule: str | None = None

    def to_json(self, benchmark: str, details: bool = False) -> dict[str, Any]:
        """Return ``{"benchmark", "scores", "count", ...}`` for JSON."""
        value: dict[str, Any] = {"benchmark": benchmark, "scores": dict(self.scores), "count": self.count}
        if self.rule is not None:
            value["rule"] = self.rule
        if self.unavailable:
            value["unavailable"] = dict(self.unavailable)
        return {**value, **self.extras, **(self.details if details else {})}


class Benchmark(ABC):
    """A benchmark's file layout, prompts and scorer.

    ``root`` is the evaluation data root, LLaVA's ``playground/data/eval`` or a folder of playground scenes.

    Args:
        rule: one of :attr:`rules`; the first by default.

    Raises:
        ConfigError: the benchmark has no such rule.
    """

    #: the question file under ``root``; its presence shows that the benchmark's data is there
    question_path: ClassVar[str]
    #: folder under ``root`` of the images that :func:`read_questions` names
    image_folder: ClassVar[str] = ""
    # Decoding, as LLaVA-1.5's evaluation scripts set it for all of their benchmarks; flags override it.
    max_new_tokens: ClassVar[int]
    temperature: ClassVar[float] = 0.0  # greedy
    top_p: ClassVar[float] = 1.0
    num_beams: ClassVar[int] = 1
    #: template of the prompts for a model whose folder does not record the one that it was trained with
    conv_mode: ClassVar[str] = "vicuna_v1"
    #: name -> description of the readings of the scoring rule, the default first; empty where there is only one
    rules: ClassVar[Mapping[str, str]] = {}

    def __init__(self, rule: str | None = None) -> None:
        if rule is not None and rule not in self.rules:
            known = ", ".join(self.rules) or "it has only one"
            raise ConfigError(f"this benchmark has no rule {rule!r}; rules: {known}")
        self.rule = rule if rule is not None else next(iter(self.rules), None)

    def question_file(self, root: Path) -> Path:
        return root / self.question_path

    def questions(self, root: Path) -> list[Question]:
        """Read all questions, by default from JSONL of LLaVA's layout.

        Raises:
            DataError: a file is missing or malformed; it is named.
        """
        return read_questions(self.question_file(root), root / self.image_folder)

    def ground_truth(self, root: Path) -> list[Row] | None:
        """Read rows for :meth:`score`; None if the answers are not public."""
        return self.read_ground_truth(self.question_file(root))

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        """Read ground truth from a single file, for scoring without a model."""
        return read_truth(file, {"question_id": ID})

    def answer_key(self, row: Mapping[str, Any]) -> Hashable:
        """Return the key that pairs an answer with its question."""
        return row["question_id"]

    def question_key(self, question: Question) -> Hashable:
        """Return the key that an answer to the question will have."""
        return self.answer_key({"question_id": question.question_id, "prompt": question.text})

    def truth_key(self, row: Mapping[str, Any]) -> Hashable:
        """Return the key that pairs a right answer with its question."""
        return row["question_id"]

    def mark_name(self, row: Mapping[str, Any]) -> Any:
        """Return a row's unique key in :attr:`Score.marks`."""
        return row["question_id"]

    def groups(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return a row's groups in a breakdown, by level."""
        return {"category": [row["category"]]} if row.get("category") else {}

    def unit(self, question: Question) -> Hashable:
        """Return the unit of questions that a limit keeps together."""
        return question.key

    def limited(self, questions: Sequence[Question], limit: int | None) -> list[Question]:
        """Choose about ``limit`` questions: whole units, evenly spread over the file."""
        if limit is None or limit >= len(questions):
            return list(questions)
        units = dict.fromkeys(map(self.unit, questions))
        chosen = set(spread(list(units), max(1, limit * len(units) // len(questions))))
        return [question for question in questions if self.unit(question) in chosen]

    def match(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Matched:
        """Pair answers with questions; see :func:`tove_llava.eval.matching.match`."""
        found = self.pair(predictions, truth)
        pairs = [(row, text) for row, text in zip(truth, found.texts, strict=True) if text is not None]
        return replace(found, unparsed=[row["question_id"] for row, text in pairs if not self.is_readable(row, text)])

    def pair(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Matched:
        """Pair answers with questions by their keys."""
        return match(predictions, truth, self.answer_key, self.truth_key)

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        """Tell if an answer has a form that the rule reads, right or wrong; by default, any text has."""
        return bool(text.strip())

    def options(self, question: Question) -> dict[str, str]:
        """Return a question's options, letter -> words; empty for open questions."""
        return lettered_options(question.text)

    def check_requirements(self) -> None:  # noqa: B027  (most need nothing beyond the base)
        """Raise ConfigError if :meth:`score` would lack a program or package."""

    @abstractmethod
    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        """Score answers, by nothing but the arguments and the rule.

        Raises:
            DataError: a row lacks a key, or no prediction belongs to this ground truth.
        """


BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark", "tove_llava.eval.benchmarks")
B = TypeVar("B", bound=type[Benchmark])


def register_benchmark(name: str) -> Callable[[B], B]:
    """Return a class decorator that registers a :class:`Benchmark` under ``name``.

    Args:
        name: what ``tove-llava eval --benchmark`` takes.

    Raises:
        ConfigError: another benchmark has that name.

    Example:
        >>> from tove_llava.eval.benchmarks import Benchmark, Score, get_benchmark
        >>> @tove_llava.register_benchmark("never_empty")
        ... class NeverEmpty(Benchmark):
        ...     question_path, image_folder = "never_empty/questions.jsonl", "never_empty/images"
        ...     def score(self, predictions, truth):
        ...         marks = {row["question_id"]: float(bool(row["text"])) for row in predictions}
        ...         return Score({"answered": sum(marks.values()) / len(marks)}, len(marks), {}, marks=marks)
        >>> get_benchmark("never_empty").score([{"question_id": 0, "text": "Red."}], []).scores
        {'answered': 1.0}
    """
    return cast("Callable[[B], B]", BENCHMARKS.register(name))


def get_benchmark(name: str, rule: str | None = None) -> Benchmark:
    """Return the benchmark called ``name``, with one of its rules.

    Raises:
        ConfigError: there is none, or it has no such rule; the message lists those that exist.
    """
    return BENCHMARKS.get(name)(rule)


def read_questions(file: Path, images: Path) -> list[Question]:
    """Read LLaVA's JSONL of ``question_id``, ``image`` and ``text``, the whole prompt.

    Args:
        images: folder that the image names are relative to.

    Raises:
        DataError: the file is missing or malformed, or an image's name leads out of its folder.
    """
    rows = read_jsonl(file, {"question_id": ID, "image": TEXT, "text": TEXT})
    return [
        Question(
            row["question_id"],
            row["text"],
            images / name_inside(images, row["image"]),
            {"category": row["category"]} if "category" in row else {},
        )
        for row in rows
    ]


def first_of(*files: Path) -> Path:
    """Return the first file that exists, else the first, for messages."""
    return next((file for file in files if file.is_file()), files[0])


def lettered_options(text: str) -> dict[str, str]:
    """Read the options in a question's text, letter -> words.

    They stand on lines of their own (``A. red``), as in LLaVA's question files, or in one line (``(A) red (B) blue``),
    from A on and without a gap.
    """
    lines = [found.groups() for line in text.split("\n") if (found := _OPTION_LINE.match(line.rstrip()))]
    for options in (lines, _INLINE_OPTION.findall(text)):
        letters = "".join(letter for letter, _ in options)
        if len(options) > 1 and letters == ascii_uppercase[: len(options)]:
            return {letter: words.strip() for letter, words in options}
    return {}
