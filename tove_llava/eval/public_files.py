"""Read benchmarks in the files of their release: JSON, JSONL, CSV, TSV and Parquet, images inside or not."""

import csv
import io
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tove_llava.core.errors import DataError
from tove_llava.core.files import parse_json_lines, read_json, read_text
from tove_llava.core.paths import name_inside
from tove_llava.eval.benchmarks import EmbeddedImage, Question, Score
from tove_llava.eval.fields import Kinds, Row, check_row
from tove_llava.eval.matching import Matched
from tove_llava.eval.rules import MarkedBenchmark

Image = Path | EmbeddedImage
_SHEETS = {".csv": ",", ".tsv": "\t"}
_LONGEST_CELL = 1 << 30  # an image in base64


def read_records(file: str | Path, kinds: Kinds | None = None) -> list[tuple[str, Row]]:
    """Read a file's records, each with the words that name it in messages.

    The suffix tells the format; a JSON file holds a list, or an object with a list ``data``. A cell of a sheet is the
    text that is written there ("None" is no missing value). Images in Parquet are buffers that are read when opened.

    Args:
        kinds: columns that every record has, and the kinds of their values.

    Raises:
        DataError: the file is missing, malformed or empty, or a record lacks a column; it is named.
    """
    records = [(place, check_row(row, place, kinds or {})) for place, row in _records(Path(file))]
    if not records:
        raise DataError(f"{file} holds no questions")
    return records


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    suffix = file.suffix.lower()
    rows: Iterable[Any]
    if suffix == ".jsonl":
        rows = (row for _, row in parse_json_lines(read_text(file), file))
    elif suffix in _SHEETS:
        rows = _sheet(file, _SHEETS[suffix])
    elif suffix == ".parquet":
        from tove_llava.data.readers import open_reader

        rows = open_reader(file)
    else:
        content = read_json(file)
        content = content.get("data") if isinstance(content, dict) else content
        if not isinstance(content, list):
            raise DataError(f"{file} is no list of questions")
        rows = content
    yield from ((f"{file}, record {number}", row) for number, row in enumerate(rows, start=1))


def _sheet(file: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise DataError(f"{file}, record {number}: it has another number of cells than the first line")
            yield row
    except csv.Error as error:
        raise DataError(f"{file}, record {number + 1}: {error}") from error


def refuse_twins(ids: Iterable[tuple[Any, str]]) -> None:
    """Raise DataError if two records, given as id and place, have one id; both are named."""
    places: dict[Any, str] = {}
    for key, place in ids:
        if (other := places.setdefault(key, place)) != place:
            raise DataError(f"{place}: question_id {key!r} is taken by {other}")


def row_images(row: Mapping[str, Any], place: str, columns: Sequence[str], folder: Path | None = None) -> list[Image]:
    """Return a record's images, in the order of the columns.

    A column holds bytes, ``{"bytes", "path"}``, base64 text, a list of these, or None or "" for no image.

    Args:
        folder: texts are names of files in it.

    Raises:
        DataError: a value is none of these, or a name leads out of the folder.
    """
    found: list[Image] = []
    for column in columns:
        value = row.get(column)
        for number, image in enumerate(value if isinstance(value, list) else [value], start=1):
            content = image.get("bytes") if isinstance(image, dict) else image
            if content is None and image is not None:
                raise DataError(f"{place}: {column!r} has a name without the image's bytes; give the file with images")
            if content is None or (isinstance(content, str) and not content):
                continue
            if isinstance(content, str) and folder is not None:
                found.append(folder / name_inside(folder, content))
            elif isinstance(content, str) or _is_bytes(content):
                name = f"{column} {number}" if isinstance(value, list) else column
                file, _, record = place.rpartition(", ")
                found.append(EmbeddedImage(f"{'/'.join(Path(file).parts[-2:])}, {record}, {name}", content))
            else:
                raise DataError(f"{place}: {column!r} must be an image, not {content!r:.80}")
    return found


def _is_bytes(value: Any) -> bool:
    try:
        return memoryview(value).nbytes > 0
    except TypeError:
        return False


class PublicBenchmark(MarkedBenchmark):
    """A benchmark in the files of its release.

    A subclass has :meth:`row`, :meth:`prompt`, and ``marking`` (a rule) or :meth:`mark` with :meth:`is_readable`.
    """

    #: patterns of files under the root; the first that any file fits counts, with all of its files
    files: ClassVar[tuple[str, ...]]
    columns: ClassVar[Kinds]  # that a record needs
    images: ClassVar[tuple[str, ...]] = ("image",)  # columns with images
    #: keys of a row by which the score is broken down, as ``per_<key>``
    levels: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        if "files" in vars(cls):
            cls.question_path = cls.files[0]

    @abstractmethod
    def row(self, record: Row, number: int, place: str) -> Row:
        """Return the row of ground truth (``question_id``, ...) of a record; ``number`` counts from 0."""

    @abstractmethod
    def prompt(self, record: Row) -> str:
        """Return a record's whole prompt."""

    def record_images(self, record: Row, place: str, root: Path) -> list[Image]:
        return row_images(record, place, self.images, root / self.image_folder if self.image_folder else None)

    def found(self, root: Path) -> list[Path]:
        """Return the files under the root; if there is none, the one that is missing, for messages."""
        matches = (sorted(root.glob(pattern)) for pattern in self.files)
        return next(filter(None, matches), [root / self.files[0]])

    def question_file(self, root: Path) -> Path:
        return self.found(root)[0]

    def questions(self, root: Path) -> list[Question]:
        questions = []
        for row, record, place in self._rows(self.found(root)):
            images = self.record_images(record, place, root)
            metadata = {level: row[level] for level in self.levels}
            first = images[0] if images else None
            questions.append(Question(row["question_id"], self.prompt(record), first, metadata, tuple(images[1:])))
        return questions

    def ground_truth(self, root: Path) -> list[Row] | None:
        return [row for row, _, _ in self._rows(self.found(root))]

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        return [row for row, _, _ in self._rows([Path(file)])]

    def _rows(self, files: Sequence[Path]) -> list[tuple[Row, Row, str]]:
        records = [found for file in files for found in read_records(file, self.columns)]
        rows = [(self.row(record, number, place), record, place) for number, (place, record) in enumerate(records)]
        refuse_twins((row["question_id"], place) for row, _, place in rows)
        return rows

    def groups(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        return {level: [str(row[level])] for level in self.levels}

    def summary(self, marks: Mapping[Any, float], truth: Sequence[Mapping[str, Any]], matched: Matched) -> Score:
        scores: dict[str, Any] = {"accuracy": sum(marks.values()) / len(marks)}
        rows = {"accuracy": (100 * scores["accuracy"], len(marks))}
        for level in self.levels:
            groups = self.grouped(marks, truth, level)
            scores[f"per_{level}"] = {name: sum(values) / len(values) for name, values in groups.items()}
            rows |= {name: (100 * sum(values) / len(values), len(values)) for name, values in groups.items()}
        return Score(scores, len(marks), rows, matched.notes(), {"per_item": dict(marks)}, marks, rule=self.rule)

    def grouped(
        self, marks: Mapping[Any, float], truth: Sequence[Mapping[str, Any]], level: str
    ) -> dict[str, list[float]]:
        """Return the marks of each group of a level, in the order of the ground truth."""
        groups: dict[str, list[float]] = {}
        for row in truth:
            groups.setdefault(str(row[level]), []).append(marks[row["question_id"]])
        return groups
