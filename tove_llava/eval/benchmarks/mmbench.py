"""MMBench (Liu et al. 2023, arXiv 2307.06281), English: LLaVA's layout, ``mmbench/mmbench_dev_20230712.tsv``.

Answers are read and scored as by VLMEvalKit without a judge model ("exact matching"): ``matching_util.py`` and
``multiple_choice.py``. The question files are LLaVA's and MMBench's own: tab-separated, with the image inside.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import OPTION_LETTER, Benchmark, EmbeddedImage, Question, Score, register_benchmark
from tove_llava.eval.fields import Field, Kinds, check_rows, one_of
from tove_llava.eval.rows import Row, read_truth
from tove_llava.eval.server_files import Submission, Submitting, known

LETTERS = "ABCD"
ROTATION = 1_000_000  # added to a question's index once for each turn of its options

#: how reports abbreviate the upper level of categories
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}

_API_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_TOKENS = 4
# There is no word boundary after the letter: "answer is between" reads as B. So does the reference.
_SENTENCE = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)

# Pandas reads a column with an empty cell as floats.
_INDEX = Field("a whole number", lambda value: type(value) in (int, float) and float(value).is_integer())
_NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6  # after index, question and four options
_CELL = 32767
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def parse_answer(text: str, options: Mapping[str, str]) -> str | bool:
    """Read the option of an answer: letter, ``Z`` (refusal) or False.

    Args:
        options: letter -> text of the options of this row.
    """
    return _letter(text, options) or _option_text(text, options)


def _letter(text: str, options: Mapping[str, str]) -> str | bool:
    if _API_FAILED in text:
        return False
    if any(phrase in text for phrase in _REFUSALS):
        return "Z"
    tokens = text.translate(_SEPARATORS).split()
    found = [letter for letter in options if letter in tokens]
    if len(found) == 1 and tokens.index(found[0]) >= len(tokens) - _LAST_TOKENS:
        return found[0]
    if not found and "Z" in tokens:
        return "Z"
    sentence = _SENTENCE.search(text)
    letter = sentence.group(1).upper() if sentence else ""
    return letter if letter in options else False


def _option_text(text: str, options: Mapping[str, str]) -> str | bool:
    """Find the single option that a short answer quotes."""
    lowered = text.lower()
    if len(lowered) > 2 * sum(len(option) for option in options.values()):
        return False
    named = [letter for letter, option in options.items() if option.lower() in lowered]
    return named[0] if len(named) == 1 else False


def is_missing(value: Any) -> bool:
    """Tell whether LLaVA's runner takes a cell as empty."""
    return value is None or value != value or (isinstance(value, str) and value.lower() in ("nan", "none"))


def read_table(file: str | Path) -> Any:
    """Read an MMBench sheet (TSV) with pandas, the official reader of cells.

    Raises:
        ConfigError: pandas is not installed.
        DataError: the file is missing or no such sheet.
    """
    try:
        import pandas
    except ImportError as error:
        raise ConfigError("MMBench's sheets need pandas; install it: pip install 'tove-llava[eval]'") from error
    if not Path(file).is_file():
        raise DataError(f"there is no file {file}")
    try:
        sheet = pandas.read_table(file)
    except (ValueError, OSError) as error:  # pandas' parsing errors and bad UTF-8 are ValueErrors
        raise DataError(f"{file} is no tab-separated sheet ({error})") from error
    missing = [name for name in ("index", "question", "A", "B") if name not in sheet]
    if missing:
        raise DataError(f"{file} has no column {missing[0]!r}; give MMBench's TSV file")
    return sheet


def image_cells(rows: Sequence[Mapping[str, Any]], file: Path) -> list[str]:
    """Return each row's image in base64; a cell may hold another row's index.

    Raises:
        DataError: a cell is empty, or leads to no image.
    """
    cells = {str(row["index"]): row.get("image") for row in rows}
    found = []
    for row in rows:
        cell = row.get("image")
        if isinstance(cell, str) and cell.strip() in cells:
            cell = cells[cell.strip()]
        if not isinstance(cell, str) or cell.strip() in cells:
            raise DataError(f"{file}, row {row['index']} has no image: {row.get('image')!r:.80}")
        found.append(cell)
    return found


def filled_cells(file: str | Path, letters: Sequence[str]) -> list[set[str]]:
    """Return for each row the letters of the options that have any text.

    Pandas reads a text such as "N/A" as missing too. No answer can name that option, as in the official program.
    """
    import pandas

    sheet = pandas.read_table(file, keep_default_na=False, dtype=str, usecols=list(letters))
    return [{letter for letter in letters if row[letter].strip()} for row in sheet.to_dict("records")]


def workbook(sheet: Any) -> bytes:
    """Make an Excel workbook of a data frame, without formulas, and read it back.

    Raises:
        ConfigError: openpyxl is not installed.
        DataError: a text holds a character that Excel's format cannot.
    """
    try:
        import pandas
        from openpyxl import load_workbook
    except ImportError as error:
        raise ConfigError("MMBench's submission needs openpyxl: pip install 'tove-llava[eval]'") from error
    for row in sheet.to_dict("records"):
        for name, value in row.items():
            _check_characters(row["index"], name, value)
    buffer = io.BytesIO()
    with pandas.ExcelWriter(buffer, engine="openpyxl") as writer:
        sheet.to_excel(writer, index=False)
        for row in writer.book.active.iter_rows():
            for cell in row:
                if cell.data_type == "f":  # an answer that starts with "=" is no formula
                    cell.data_type = "s"
    _, *rows = load_workbook(buffer, read_only=True).active.iter_rows(values_only=True)
    for row, cells in zip(sheet.to_dict("records"), rows, strict=True):
        for (name, value), cell in zip(row.items(), cells, strict=True):
            if isinstance(value, str) and _line_ends(value)[:_CELL] != _line_ends(str(cell or "")):
                raise DataError(f"question {row['index']}: Excel's format changes {name!r} to {cell!r:.80}")
    return buffer.getvalue()


def _check_characters(index: Any, name: str, value: Any) -> None:
    if isinstance(value, str) and (found := _NOT_XML.search(value)):
        raise DataError(
            f"question {index}: {name!r} holds the control character or half character {ascii(found.group())}, which "
            "Excel's format cannot hold; take it out of the file"
        )


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


class MmBenchmark(Benchmark, Submitting):
    """Circular evaluation: a question needs right answers to all its rotations."""

    max_new_tokens = 1024
    submission_suffix = ".xlsx"
    request: ClassVar[str]  # for an answer by letter

    def questions(self, root: Path) -> list[Question]:
        file = self.question_file(root)
        questions = []
        rows = check_rows(read_table(file).to_dict("records"), file, {"index": _INDEX})
        for row, image in zip(rows, image_cells(rows, file), strict=True):
            lines = [] if is_missing(row.get("hint")) else [str(row["hint"])]
            lines.append(str(row["question"]))
            options = []
            for letter in LETTERS:
                if is_missing(row.get(letter)):
                    break  # LLaVA's runner stops at the first missing option
                options.append(f"{letter}. {row[letter]}")
            name = f"{file.name} row {row['index']}"
            text = "\n".join([*lines, *options, self.request])
            questions.append(Question(int(row["index"]), text, EmbeddedImage(name, image)))
        return questions

    def ground_truth(self, root: Path) -> list[Row] | None:
        file = self.question_file(root)
        return self.read_ground_truth(file) if "answer" in read_table(file) else None

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        kinds: Kinds = {"index": _INDEX, "answer": one_of(*LETTERS), "A": object, "B": object}
        if Path(file).suffix == ".jsonl":
            rows = read_truth(file, kinds)
            filled = [{letter for letter in LETTERS if row.get(letter) is not None} for row in rows]
        else:
            sheet = read_table(file)
            rows = check_rows(sheet.astype(object).where(sheet.notna(), None).to_dict("records"), file, kinds)
            filled = filled_cells(file, [letter for letter in LETTERS if letter in sheet])
        truth = []
        for row, letters in zip(rows, filled, strict=True):
            if not {"A", "B", row["answer"]} <= letters:
                raise DataError(f"{file}, row {row['index']}: A, B and the answer {row['answer']} must be options")
            options = {letter: str(row[letter]) for letter in LETTERS if row.get(letter) is not None}
            labels = {key: row.get(key) for key in ("category", "l2-category", "split")}
            truth.append({"question_id": int(row["index"]), "answer": row["answer"], "options": options, **labels})
        return truth

    def unit(self, question: Question) -> int:
        return int(question.question_id) % ROTATION  # of all rotations, each of which has to be right

    def groups(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        return {level: [str(row[level])] for level in ("l2-category", "category") if row[level] is not None}

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return parse_answer(text, row["options"]) in row["options"]

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        parsed: dict[int, str | bool] = {}
        right: dict[int, float] = {}
        groups: dict[int, list[float]] = {}
        first: dict[int, Mapping[str, Any]] = {}
        for row, text in zip(truth, matched.texts, strict=True):
            index = row["question_id"]
            parsed[index] = False if text is None else parse_answer(text, row["options"])
            right[index] = float(parsed[index] == row["answer"])
            groups.setdefault(index % ROTATION, []).append(right[index])
            first.setdefault(index % ROTATION, row)
        hits = {index: float(all(rotations)) for index, rotations in groups.items()}
        splits = sorted({str(row["split"]) for row in first.values() if row["split"] is not None})
        scores: dict[str, Any] = {"split": ", ".join(splits) or "none", "Overall": mean(list(hits.values()))}
        rows = {"overall": (100 * scores["Overall"], len(hits))}
        for level in ("l2-category", "category"):
            names = sorted({str(row[level]) for row in first.values() if row[level] is not None})
            for name in names:
                values = [hits[index] for index, row in first.items() if str(row[level]) == name]
                label = ABBREVIATIONS.get(name, name)
                scores[label] = mean(values)
                rows[label] = (100 * scores[label], len(values))
        unturned = [mark for index, mark in right.items() if index < ROTATION]
        extra = {"all_rows_independent": mean(list(right.values()))}
        if unturned:
            extra["first_rotation_only"] = mean(unturned)
        extras = {"count_questions": len(hits), "count_rows": len(right), "extra": extra, **matched.notes()}
        details = {"per_question_hit": hits, "per_row_parsed": parsed}
        return Score(scores, len(hits), rows, extras, details, hits)

    def submission_questions(self, root: Path) -> Path:
        return self.question_file(root)

    def submission(self, predictions: Sequence[Mapping[str, Any]], questions: Path | None) -> Submission:
        file = known(questions)
        sheet = read_table(file)
        rows = check_rows(sheet[["index"]].to_dict("records"), file, {"index": _INDEX})
        matched = self.pair(predictions, [{"question_id": int(row["index"])} for row in rows])
        for row in predictions:
            _check_characters(row["question_id"], "text", row["text"])
        sheet = sheet.drop(columns=[name for name in _NOT_SUBMITTED if name in sheet])
        sheet.insert(min(_PREDICTION_COLUMN, len(sheet.columns)), "prediction", matched.texts)
        cut = [row["question_id"] for row in matched.answers if row is not None and len(row["text"]) > _CELL]
        notes = {**matched.ids(), f"cut to Excel's {_CELL} characters": cut}
        return Submission(workbook(sheet), len(sheet) - len(matched.unanswered), notes)


@register_benchmark("mmbench")
class MmBench(MmBenchmark):
    """Multiple-choice questions on twenty abilities."""

    question_path = "mmbench/mmbench_dev_20230712.tsv"
    request = OPTION_LETTER
