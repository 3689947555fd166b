"""A benchmark of your own without code: a file of questions, a folder of images, and a rule.

A record has ``question``, ``image`` (a name, a list of names, or null) and ``answer`` (or a list, ``answers``);
optional are ``options``, ``category`` and ``question_id`` (else the record's number from 0). The file is JSONL, or JSON
with a list. A folder with such a file and a ``benchmark.yaml`` (fields of :class:`OwnSpec`) is a benchmark by its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.files import read_text
from tove_llava.core.mappings import from_mapping, parse_yaml
from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import BENCHMARKS, Benchmark, Question, Score, get_benchmark
from tove_llava.eval.benchmarks.mmvet import conversation
from tove_llava.eval.captions import UNAVAILABLE, CaptionBenchmark, caption_scores, remarks, table_rows
from tove_llava.eval.fields import ID, TEXT, Kinds, Row, check_row
from tove_llava.eval.judge import Judge, JudgedBenchmark
from tove_llava.eval.public_files import read_records, refuse_twins
from tove_llava.eval.rules import RULES, MarkedBenchmark, get_rule

SPEC = "benchmark.yaml"
CAPTION, JUDGE = "caption", "judge"  # rules over a whole set
Found = tuple[str, Benchmark, Path]


@dataclass(frozen=True)
class OwnSpec:
    """The content of a ``benchmark.yaml``.

    Attributes:
        questions: the file, relative to the folder.
        rule: how answers are scored.
        images: folder of the images, relative to the folder.
        prompt: ends every question, on a line of its own; by default the rule's request, "" for none.
        max_new_tokens: the longest answer.
    """

    questions: str
    rule: str
    images: str = "."
    prompt: str | None = None
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")


class OwnBenchmark(Benchmark):
    """Questions of one file.

    Args:
        folder: what the spec's paths are relative to.

    Raises:
        ConfigError: there is no such rule.
    """

    marking: Any = None  # a rule, where answers are marked one by one

    def __init__(self, spec: OwnSpec, folder: Path) -> None:
        super().__init__()
        self.spec, self.rule = spec, spec.rule
        self.file, self.images = folder / spec.questions, folder / spec.images
        self.max_new_tokens = spec.max_new_tokens  # type: ignore[misc]

    def question_file(self, root: Path) -> Path:
        return self.file

    def questions(self, root: Path) -> list[Question]:
        questions = []
        for row in self.read_ground_truth(self.file):
            lines = [row["question"], *(f"{letter}. {words}" for letter, words in row["options"].items())]
            request = self.spec.prompt if self.spec.prompt is not None else self._request()
            first, *more = [self.images / name for name in row["images"]] or [None]
            metadata = {"category": row["category"]} if row["category"] else {}
            text = "\n".join([*lines, *([request] if request else [])])
            questions.append(Question(row["question_id"], text, first, metadata, tuple(filter(None, more))))
        return questions

    def _request(self) -> str:
        return "" if self.marking is None else self.marking.request

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        records = read_records(file)
        rows = [self._row(row, number, place) for number, (place, row) in enumerate(records)]
        refuse_twins((row["question_id"], place) for row, (place, _) in zip(rows, records, strict=True))
        return rows

    def _row(self, row: Row, number: int, place: str) -> Row:
        """Check a record and bring it into one form."""
        kinds: Kinds = {"question": TEXT, "question_id": ID, "category": (str, type(None))}
        given = {"question": row.get("question", row.get("text")), "question_id": number, "category": None}
        found = check_row({**given, **{key: row[key] for key in given if key in row}}, place, kinds)
        images = _texts(row.get("image", row.get("images", [])), place, "image", least=0)
        answers = _texts(row.get("answers", row.get("answer")), place, "answer", least=1)
        options = _options(row.get("options"), place)
        found = {**found, "images": images, "options": options, "answers": answers, "references": answers}
        if self.marking is not None:
            if len(answers) < self.marking.least_answers:
                raise DataError(
                    f"{place}: the rule {self.rule!r} needs {self.marking.least_answers} answers a question"
                )
            if self.marking.needs_options and not options:
                raise DataError(f"{place}: the rule {self.rule!r} needs 'options'")
            if problem := self.marking.problem(found):
                raise DataError(f"{place}: {problem}, not {answers[0]!r:.80}")
        if options:
            found["answers"] = [_letter(answer, options, place) for answer in answers] if self._by_letter() else answers
        return found

    def _by_letter(self) -> bool:
        return self.marking is not None and self.marking.needs_options

    def options(self, question: Question) -> dict[str, str]:
        return super().options(question) if self._by_letter() else {}


class OwnMarked(MarkedBenchmark, OwnBenchmark):
    """Questions that are marked one by one."""

    def __init__(self, spec: OwnSpec, folder: Path) -> None:
        super().__init__(spec, folder)
        self.marking = get_rule(spec.rule)


class OwnCaptions(OwnBenchmark, CaptionBenchmark):
    """Images with reference captions."""

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        tokens = self.tokens(truth, matched)
        (found,) = caption_scores(tokens, [list(tokens.candidates)])
        details = {"per_item": found.per_image}
        rows = table_rows(found.total, len(truth))
        return Score(found.total, len(truth), rows, remarks(tokens, matched), details, {}, UNAVAILABLE, self.rule)


class OwnJudged(OwnBenchmark, JudgedBenchmark):
    """Free answers that a judge grades from 0 to 1, with MM-Vet's request."""

    def verdicts(self, judge: Judge, truth: Sequence[Mapping[str, Any]], texts: Sequence[str | None]) -> Score:
        asked = [(row, text) for row, text in zip(truth, texts, strict=True) if text is not None]
        talks = [conversation({**row, "answer": "<OR>".join(row["answers"])}, text) for row, text in asked]
        grades = dict(zip((row["question_id"] for row, _ in asked), judge.hold(talks), strict=True))
        marks: dict[Any, float] = {row["question_id"]: grades.get(row["question_id"]) or 0.0 for row in truth}
        unread = [key for key, grade in grades.items() if grade is None]
        accuracy = mean(list(marks.values()))
        rows = {"grade": (100 * accuracy, len(marks))}
        extras = {"unparsed_replies": unread}
        return Score({"grade": accuracy}, len(marks), rows, extras, {"per_item": marks}, marks, rule=self.rule)


def own_benchmark(spec: OwnSpec, folder: Path) -> OwnBenchmark:
    """Make the benchmark of a spec.

    Raises:
        ConfigError: there is no such rule.
    """
    kinds: dict[str, type[OwnBenchmark]] = {CAPTION: OwnCaptions, JUDGE: OwnJudged}
    return kinds.get(spec.rule, OwnMarked)(spec, folder)


def from_file(file: str | Path, images: str | Path | None, rule: str | None, prompt: str | None = None) -> Found:
    """Return name, benchmark and image folder of a file of questions; the name is the file's.

    Args:
        images: what the file's image names are relative to; by default, the working folder.

    Raises:
        ConfigError: no rule is given, or a public benchmark has that name.
    """
    file, images = Path(file).absolute(), Path(images or ".").absolute()
    if rule is None:
        raise ConfigError(f"--questions needs --rule: {', '.join(RULES)}, {CAPTION} or {JUDGE}")
    if file.stem in BENCHMARKS:
        raise ConfigError(f"{file.stem!r} is the name of a public benchmark; rename {file}")
    spec = OwnSpec(str(file), rule, str(images), prompt)
    return file.stem, own_benchmark(spec, Path()), images


def find_own(name: str, roots: Sequence[str | Path], rule: str | None = None) -> Found | None:
    """Find the folder ``name`` with a ``benchmark.yaml``, which is a root or under one, or None.

    Args:
        rule: replaces the file's.

    Raises:
        ConfigError: the file is malformed, or there is no such rule.
    """
    for folder in (place for root in roots for place in (Path(root) / name, Path(root))):
        file = folder / SPEC
        if folder.resolve().name == name and file.is_file():
            spec = from_mapping(OwnSpec, parse_yaml(read_text(file, ConfigError), str(file)), str(file))
            spec = spec if rule is None else replace(spec, rule=rule)
            return name, own_benchmark(spec, folder), folder / spec.images
    return None


def any_benchmark(name: str, roots: Sequence[str | Path], rule: str | None = None) -> Benchmark:
    """Return a public benchmark, or one of the user's own under a root.

    Raises:
        ConfigError: there is none of that name, or it has no such rule.
    """
    own = None if name in BENCHMARKS else find_own(name, roots, rule)
    return get_benchmark(name, rule) if own is None else own[1]


def _texts(value: Any, place: str, key: str, least: int) -> list[str]:
    """Return one text or number, or a list of them, as texts."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if len(values) < least or not all(isinstance(each, str | int | float) and str(each).strip() for each in values):
        raise DataError(f"{place}: {key!r} must be a text, or a list of texts, not {value!r:.80}")
    return list(map(str, values))


def _options(value: Any, place: str) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, list):
        value = dict(zip(ascii_uppercase, value, strict=False)) if len(value) <= len(ascii_uppercase) else None
    letters = ascii_uppercase[: len(value)] if isinstance(value, dict) else ""
    if not isinstance(value, dict) or len(value) < 2 or "".join(map(str, value)) != letters:
        raise DataError(f"{place}: 'options' must be a list of 2 to 26 texts, or an object with the keys A, B, ...")
    return dict(zip(value, _texts(list(value.values()), place, "options", least=2), strict=True))


def _letter(answer: str, options: Mapping[str, str], place: str) -> str:
    """Return the letter of a right answer, which is a letter or an option's words."""
    named = [letter for letter, words in options.items() if words == answer]
    if len(named) == 1 and (answer not in options or len(answer) > 1):
        return named[0]
    if answer not in options:
        raise DataError(
            f"{place}: the answer {answer!r:.80} is no option; options: {', '.join(options.values())!r:.200}"
        )
    return answer
