"""LLaVA-Bench (In-the-Wild; Liu et al. 2023, arXiv 2304.08485): free answers, judged.

LLaVA's layout: ``llava-bench-in-the-wild/questions.jsonl``, ``context.jsonl``, ``answers_gpt4.jsonl`` and ``images/``.
The request and the reading of the judge's scores follow LLaVA's ``eval_gpt_review_bench.py``, the sums
``summarize_gpt_review.py``. Ground truth for ``tove-llava score`` is ``questions.jsonl`` with the other two next to it.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.eval.agreement import mean
from tove_llava.eval.benchmarks import Score, register_benchmark
from tove_llava.eval.fields import ID, TEXT, one_of
from tove_llava.eval.judge import Exchange, Judge, JudgedBenchmark, Request
from tove_llava.eval.rows import Row, read_truth
from tove_llava.eval.scorer_data import scorer_data
from tove_llava.inference.reasoning import spoken

_TEMPERATURE = 0.2
_MAX_TOKENS = 1024
_UNREAD = (-1.0, -1.0)  # counts in the means, as in the reference


def parse_review(review: str) -> tuple[float, float]:
    """Read the reference's and the model's score from a review's first line, after a think block."""
    parts = spoken(review).answer.split("\n")[0].replace(",", " ").split(" ")
    if len(parts) != 2:
        return _UNREAD
    try:
        pair = float(parts[0]), float(parts[1])
    except ValueError:
        return _UNREAD
    return pair if all(map(isfinite, pair)) else _UNREAD


def request(row: Mapping[str, Any], answer: str) -> Request:
    """Make the judge's request about an answer."""
    fixed = scorer_data("llava_bench")
    role = fixed["role"]
    parts = (
        f"[Context]\n{row['context']}",
        f"[Question]\n{row['question']}",
        f"[{role} 1]\n{row['reference']}",
        f"[End of {role} 1]",
        f"[{role} 2]\n{answer}",
        f"[End of {role} 2]",
        f"[System]\n{fixed['prompts'][row['category']]}",
    )
    messages = (
        {"role": "system", "content": fixed["system"]},
        {"role": "user", "content": "".join(f"{part}\n\n" for part in parts)},
    )
    return Request(messages, _TEMPERATURE, _MAX_TOKENS)


@register_benchmark("llava_bench")
class LlavaBench(JudgedBenchmark):
    """The model's score as percent of GPT-4's, per category and over all."""

    question_path = "llava-bench-in-the-wild/questions.jsonl"
    image_folder = "llava-bench-in-the-wild/images"

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        category = one_of(*scorer_data("llava_bench")["prompts"])
        rows = read_truth(file, {"question_id": ID, "image": TEXT, "text": TEXT, "category": category})
        contexts, references = Path(file).with_name("context.jsonl"), Path(file).with_name("answers_gpt4.jsonl")
        told = read_truth(contexts, {"image": TEXT, "caption": (str, list)})
        captions = {row["image"]: row["caption"] for row in told}
        given = read_truth(references, {"question_id": ID, "text": TEXT})
        answers = {row["question_id"]: row["text"] for row in given}
        truth = []
        for row in rows:
            if row["image"] not in captions:
                raise DataError(f"{contexts} has no caption of {row['image']!r}")
            if row["question_id"] not in answers:
                raise DataError(f"{references} has no answer to question {row['question_id']!r}")
            caption = captions[row["image"]]
            truth.append(
                {
                    "question_id": row["question_id"],
                    "question": row["text"],
                    "category": row["category"],
                    "context": caption if isinstance(caption, str) else "\n".join(map(str, caption)),
                    "reference": answers[row["question_id"]],
                }
            )
        return truth

    def verdicts(self, judge: Judge, truth: Sequence[Mapping[str, Any]], texts: Sequence[str | None]) -> Score:
        # A missing answer is judged as an empty one.
        reviews = judge.hold([_conversation(row, text or "") for row, text in zip(truth, texts, strict=True)])
        pairs = [parse_review(review) for review in reviews]
        groups: dict[str, list[tuple[float, float]]] = {"all": pairs}
        for row, pair in zip(truth, pairs, strict=True):
            groups.setdefault(row["category"], []).append(pair)
        scores = {name: _summary(values) for name, values in groups.items()}
        rows = {name: (entry["relative_percent"], len(groups[name])) for name, entry in scores.items()}
        ids = [row["question_id"] for row in truth]
        unread = [key for key, pair in zip(ids, pairs, strict=True) if pair == _UNREAD]
        per_item = {
            key: {"scores": pair, "review": review} for key, pair, review in zip(ids, pairs, reviews, strict=True)
        }
        extras = {"unread_reviews": unread, "unparsed_replies": unread}
        return Score(scores, len(truth), rows, extras, {"per_item": per_item})


def _conversation(row: Mapping[str, Any], answer: str) -> Exchange[str]:
    return (yield request(row, answer))


def _summary(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Round as the reference prints: means to 3 digits, percent to 1."""
    reference, model = (round(mean(list(column)), 3) for column in zip(*pairs, strict=True))
    return {
        "relative_percent": round(100 * model / reference, 1) if reference else 0.0,
        "reference_percent": round(10 * reference, 1),
        "model_percent": round(10 * model, 1),
    }
