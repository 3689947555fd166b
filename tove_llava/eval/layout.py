"""Question files in the form that LLaVA's evaluation folders share."""

from pathlib import Path
from typing import Any

from tove_llava.eval.benchmarks import Question
from tove_llava.eval.rows import read_jsonl


def read_questions(file: Path, images: Path) -> list[Question]:
    """Questions of a JSONL file with ``question_id``, ``image`` and ``text``; the text is the whole prompt.

    Args:
        images: folder that the image names are relative to.

    Raises:
        DataError: the file is missing or malformed.
    """
    rows = read_jsonl(file, required=("question_id", "image", "text"))
    return [Question(row["question_id"], row["text"], images / row["image"], _metadata(row)) for row in rows]


def _metadata(row: dict[str, Any]) -> dict[str, Any]:
    return {"category": row["category"]} if "category" in row else {}


def first_of(*files: Path) -> Path:
    """The first file that exists; the first of all where none does (so that messages name it)."""
    return next((file for file in files if file.is_file()), files[0])
