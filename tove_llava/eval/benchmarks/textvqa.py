"""TextVQA (Singh et al. 2019, arXiv 1904.08920): questions about written text.

LLaVA's layout: ``textvqa/llava_textvqa_val_v051_ocr.jsonl`` (questions with the whole prompt; the id is the image's),
``textvqa/TextVQA_0.5.1_val.json`` and ``textvqa/train_images/``. Scores follow LLaVA's ``eval_textvqa.py``: the
question is read back from the prompt, and with the image's id it finds the record.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json
from tove_llava.eval.agreement import agreement, mean
from tove_llava.eval.benchmarks import Benchmark, Score, register_benchmark
from tove_llava.eval.fields import ID, TEN_TEXTS, TEXT, check_rows
from tove_llava.eval.matching import Matched
from tove_llava.eval.normalisation import normalise_evalai
from tove_llava.eval.rows import Row

_OCR_FIRST = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
_OCR_LINE = "Reference OCR token:"
_SHOWN = 400  # characters of a normalised answer in the details


def question_of(prompt: str) -> str | None:
    """Read the question from one of LLaVA's four forms of prompt; None for another form.

    LLaVA's program stops at a question or an OCR token with a line break. Here such a prompt is read as well.
    """
    if prompt.startswith("OCR tokens: "):
        found = _OCR_FIRST.search(prompt)
        return found.group(1) if found else None
    head, _, request = prompt.rpartition("\n")
    if not head or not request:
        return None
    if head.startswith(_OCR_LINE):
        return head.rpartition("\n")[2] if "\n" in head else None
    return head.partition(f"\n{_OCR_LINE}")[0]


@register_benchmark("textvqa")
class TextVqa(Benchmark):
    """Consensus accuracy."""

    question_path = "textvqa/llava_textvqa_val_v051_ocr.jsonl"
    image_folder = "textvqa/train_images"
    max_new_tokens = 128

    def ground_truth(self, root: Path) -> list[Row]:
        return self.read_ground_truth(root / "textvqa" / "TextVQA_0.5.1_val.json")

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("data"), list):
            raise DataError(f"{file} has no list 'data'; give TextVQA's annotation file")
        rows = check_rows(content["data"], file, {"image_id": ID, "question": TEXT, "answers": TEN_TEXTS})
        # Answers carry the image's id as their question_id.
        return [{**row, "record_id": row.get("question_id"), "question_id": row["image_id"]} for row in rows]

    def answer_key(self, row: Mapping[str, Any]) -> tuple[Any, str | None]:
        prompt = row.get("prompt")
        question = question_of(prompt) if isinstance(prompt, str) else None
        return row["question_id"], None if question is None else question.lower()

    def pair(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Matched:
        if all(self.answer_key(row)[1] is None for row in predictions):
            raise DataError(
                f"the question cannot be read back from the prompt {predictions[0].get('prompt')!r:.200}; answers to "
                "TextVQA need LLaVA's prompts: the question, optionally a line of OCR tokens, and the request for a "
                "short answer"
            )
        return super().pair(predictions, truth)

    def truth_key(self, row: Mapping[str, Any]) -> Hashable:
        return row["question_id"], row["question"].lower()

    def mark_name(self, row: Mapping[str, Any]) -> str:
        return f"{row['question_id']}: {row['question']}"

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        marks: dict[Any, float] = {}
        items: dict[Hashable, Row] = {}
        for row, text in zip(truth, matched.texts, strict=True):
            answer = None if text is None else normalise_evalai(text)
            mark = 0.0 if answer is None else agreement(answer, [normalise_evalai(given) for given in row["answers"]])
            key = self.truth_key(row)
            marks[self.mark_name(row)] = mark
            items[key] = {
                "question_id": row["record_id"],
                "image_id": row["question_id"],
                "parsed_question": row["question"].lower(),
                "normalized_prediction": None if answer is None else answer[:_SHOWN],
                "score": mark,
            }
        accuracy = mean(list(marks.values()))
        # In the order of the answers, as the reference goes through them.
        asked = dict.fromkeys(self.answer_key(row) for row in predictions)
        per_item = [items[key] for key in asked if key in items]
        rows = {"accuracy": (100 * accuracy, len(truth))}
        return Score({"accuracy": accuracy}, len(truth), rows, matched.notes(), {"per_item": per_item}, marks)
