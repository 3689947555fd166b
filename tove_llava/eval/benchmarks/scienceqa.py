"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): multiple choice, partly with images.

LLaVA's layout: ``scienceqa/llava_test_CQM-A.json``, ``scienceqa/images/test/``, ``scienceqa/pid_splits.json`` and
``scienceqa/problems.json``. Scores follow LLaVA's ``eval_science_qa.py``. Ground truth for ``tove-llava score`` is
``problems.json`` with ``pid_splits.json`` next to it, or one file with both objects under those names.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json
from tove_llava.eval.benchmarks import OPTION_LETTER, Benchmark, Question, Score, register_benchmark
from tove_llava.eval.fields import ID, TEXT, WHOLE, a_list, an_object, check_rows
from tove_llava.eval.rows import Row

LETTERS = "ABCDE"
PLACEHOLDER = "<image>"  # as in tove_llava.data, whose import takes seconds
FAILED = "FAILED"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def parse_answer(text: str) -> str:
    """Read the letter of an answer, or ``FAILED``.

    It is the whole text, or in front of ". ", or in a single "The answer is X" that at least one more character follows
    on its line. Nothing is trimmed.
    """
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    letters = _SENTENCE.findall(text)
    return str(letters[0]) if len(letters) == 1 else FAILED


def option_index(letter: str, options: int) -> int:
    """Return a letter's index among the options, or -1."""
    return LETTERS.index(letter) if letter in tuple(LETTERS[:options]) else -1


@register_benchmark("scienceqa")
class ScienceQa(Benchmark):
    """Accuracy over all questions and over those with an image."""

    question_path = "scienceqa/llava_test_CQM-A.json"
    max_new_tokens = 1024

    def questions(self, root: Path) -> list[Question]:
        file = self.question_file(root)
        content = read_json(file)
        if not isinstance(content, list):
            raise DataError(f"{file} is no list of records; give LLaVA's question file")
        images = root / "scienceqa" / "images" / "test"
        questions = []
        for row in check_rows(content, file, {"id": ID, "conversations": a_list(an_object({"value": str}))}):
            text = row["conversations"][0]["value"].replace(PLACEHOLDER, "").strip() + f"\n{OPTION_LETTER}"
            image = images / row["image"] if "image" in row else None
            # The placeholder in the answer line's prompt is what image accuracy goes by.
            questions.append(Question(row["id"], f"{PLACEHOLDER}\n{text}" if image else text, image))
        return questions

    def ground_truth(self, root: Path) -> list[Row]:
        return self.read_ground_truth(root / "scienceqa" / "problems.json")

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        content = read_json(file)
        combined = isinstance(content, dict) and isinstance(content.get("problems"), dict)
        problems = content["problems"] if combined else content
        if not isinstance(problems, dict):
            raise DataError(f"{file} is no dictionary of problems by id; give ScienceQA's problems.json")
        check_rows(problems, file, {"choices": a_list(TEXT), "answer": WHOLE})
        split_file = Path(file).with_name("pid_splits.json")
        splits = content.get("pid_splits") if combined else read_json(split_file)
        ids = splits.get("test") if isinstance(splits, dict) else None
        if not isinstance(ids, list):
            raise DataError(f"{file if combined else split_file} has no list of the test split's ids")
        missing = [key for key in ids if not isinstance(key, str) or key not in problems]
        if missing:
            raise DataError(f"{file}: problem {missing[0]!r} of the test split is missing")
        rows = [problems[key] for key in ids]
        for key, row in zip(ids, rows, strict=True):
            most = min(len(LETTERS), len(row["choices"])) - 1
            if not 0 <= row["answer"] <= most:
                raise DataError(f"{file}, problem {key!r}: the answer must be 0 to {most}, not {row['answer']}")
        return [
            {"question_id": key, "choices": row["choices"], "answer": row["answer"]}
            for key, row in zip(ids, rows, strict=True)
        ]

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return option_index(parse_answer(text), len(row["choices"])) >= 0

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        per_item: dict[Any, dict[str, Any]] = {}
        for row, answer in zip(truth, matched.answers, strict=True):
            letter = FAILED if answer is None else parse_answer(answer["text"])
            index = option_index(letter, len(row["choices"]))
            prompt = "" if answer is None else answer.get("prompt")
            if not isinstance(prompt, str):
                raise DataError(f"the answer to question {row['question_id']!r} has no prompt")
            per_item[row["question_id"]] = {
                "parsed": letter,
                "index": index,
                "correct": index == row["answer"],
                "is_multimodal": PLACEHOLDER in prompt,
            }
        marks = {key: float(item["correct"]) for key, item in per_item.items()}
        seen = [item["correct"] for item in per_item.values() if item["is_multimodal"]]
        correct = sum(item["correct"] for item in per_item.values())
        scores: dict[str, Any] = {"accuracy_percent": 100 * correct / len(truth)}
        unavailable = {}
        if seen:
            scores["img_accuracy_percent"] = round(100 * sum(seen) / len(seen), 2)  # the reference only prints it
        else:
            unavailable["img_accuracy_percent"] = "no answer's prompt has an image placeholder"
        scores |= {"correct": correct, "total": len(truth), "img_correct": sum(seen), "img_total": len(seen)}
        rows = {"accuracy": (scores["accuracy_percent"], len(truth))}
        if seen:
            rows["accuracy with picture"] = (scores["img_accuracy_percent"], len(seen))
        return Score(scores, len(truth), rows, matched.notes(), {"per_item": per_item}, marks, unavailable)
