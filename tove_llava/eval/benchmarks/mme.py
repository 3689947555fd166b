"""MME (Fu et al. 2023, arXiv 2306.13394): two yes/no questions an image.

LLaVA's layout: ``MME/llava_mme.jsonl`` (questions with the whole prompt; the two questions of an image share the id
``category/image``) and ``MME/MME_Benchmark_release_version/``, whose text files have the answers. Scores follow
MME's ``calculation.py``. Ground truth for ``tove-llava score`` is JSONL with ``category, image, question, answer``.

Answers are paired by id and the question in their prompt. Where the prompts do not tell the two questions of an image
apart, lines are paired by position, as the reference does; the files must then run in parallel.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.core.files import read_text
from tove_llava.eval.benchmarks import SHORT_ANSWER, Benchmark, Question, Score, register_benchmark
from tove_llava.eval.fields import ID, TEXT, Field, one_of
from tove_llava.eval.matching import Matched
from tove_llava.eval.rows import Row, read_jsonl, read_truth

_PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR"
_COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning"
SUBTASKS = {"Perception": _PERCEPTION.split(), "Cognition": _COGNITION.split()}
_TYPE = {name: kind for kind, names in SUBTASKS.items() for name in names}
_YES_OR_NO = "Please answer yes or no."
_ANSWER = Field("Yes or No", lambda value: isinstance(value, str) and value.lower() in ("yes", "no"))
_PREFIX = 4  # characters of an answer that are looked at


def parse_answer(text: str) -> str:
    """Read "yes", "no" or "other" from the first four characters, untrimmed."""
    prefix = text.lower()[:_PREFIX]
    return next((word for word in ("yes", "no") if word in prefix), "other")


def core(text: str) -> str:
    """Return a question without the requests for a form of answer."""
    return " ".join(text.replace(SHORT_ANSWER, " ").replace(_YES_OR_NO, " ").split())


@register_benchmark("mme")
class Mme(Benchmark):
    """Points: percent of right answers plus percent of images with both right."""

    question_path = "MME/llava_mme.jsonl"
    image_folder = "MME/MME_Benchmark_release_version"
    max_new_tokens = 128

    def ground_truth(self, root: Path) -> list[Row]:
        release = root / "MME" / "MME_Benchmark_release_version"
        known: dict[Path, dict[str, str]] = {}
        truth = []
        for question in read_jsonl(self.question_file(root), {"question_id": ID, "text": TEXT}):
            key = PurePosixPath(str(question["question_id"]))
            category, stem = str(key).split("/")[0], key.name.split(".")[0]
            if category not in _TYPE:
                raise DataError(f"{self.question_file(root)}: {str(key)!r} must begin with one of MME's subtasks")
            folder = release / category / "questions_answers_YN"
            file = (folder if folder.is_dir() else release / category) / f"{stem}.txt"
            if file not in known:
                known[file] = _read_answers(file)
            text = core(question["text"])
            if text not in known[file]:
                raise DataError(f"{file} has no answer to {question['question_id']!r}: {text!r}")
            truth.append(
                {
                    "question_id": question["question_id"],
                    "category": category,
                    "question": question["text"],
                    "answer": known[file][text],
                }
            )
        return _paired(truth, self.question_file(root))

    def read_ground_truth(self, file: str | Path) -> list[Row]:
        rows = read_truth(file, {"category": one_of(*_TYPE), "image": TEXT, "question": TEXT, "answer": _ANSWER})
        return _paired([{"question_id": f"{row['category']}/{row['image']}", **row} for row in rows], file)

    def answer_key(self, row: Mapping[str, Any]) -> Hashable:
        if not isinstance(row.get("prompt"), str):
            raise DataError(f"the answer to {row['question_id']!r} has no prompt, which tells the two questions apart")
        return row["question_id"], core(row["prompt"])

    def truth_key(self, row: Mapping[str, Any]) -> Hashable:
        return row["question_id"], core(row["question"])

    def unit(self, question: Question) -> Hashable:
        return question.question_id  # of an image whose questions both have to be right

    def mark_name(self, row: Mapping[str, Any]) -> str:
        return f"{row['question_id']}: {row['question']}"

    def pair(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Matched:
        parallel = [row["question_id"] for row in predictions] == [row["question_id"] for row in truth]
        if truth and parallel and not self._distinguished(predictions, truth):
            return Matched(list(predictions), [], [], [])
        return super().pair(predictions, truth)

    def is_readable(self, row: Mapping[str, Any], text: str) -> bool:
        return parse_answer(text) != "other"

    def _distinguished(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> bool:
        """Tell whether each prompt names one question, and each question has one."""
        if not all(isinstance(row.get("prompt"), str) for row in predictions):
            return False
        asked = {self.answer_key(row) for row in predictions}
        return len(asked) == len(predictions) and asked == {self.truth_key(row) for row in truth}

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)
        items: dict[str, list[tuple[Any, str, str]]] = {}
        per_item, marks = [], {}
        for row, text in zip(truth, matched.texts, strict=True):
            # A missing answer is what the reference calls "other": always wrong.
            label, answer = row["answer"].lower(), "other" if text is None else parse_answer(text)
            items.setdefault(row["category"], []).append((row["question_id"], label, answer))
            per_item.append({"question_id": row["question_id"], "text": text, "label": answer})
            marks[self.mark_name(row)] = float(label == answer)
        subtasks = {name: _subtask(name, items[name]) for name in _TYPE if name in items}
        scores: dict[str, Any] = {}
        unavailable = {}
        for kind, names in SUBTASKS.items():
            missing = [name for name in names if name not in subtasks]
            if missing:
                unavailable[kind.lower()] = f"the ground truth lacks {', '.join(missing)}"
            else:
                scores[kind.lower()] = sum(subtasks[name]["score"] for name in names)
        if unavailable:
            unavailable["total"] = "it needs perception and cognition"
        else:
            scores["total"] = scores["perception"] + scores["cognition"]
        rows = {f"{name} (points)": (value, len(truth)) for name, value in scores.items()}
        rows |= {f"{name} (points)": (entry["score"], len(items[name])) for name, entry in subtasks.items()}
        scores["subtasks"] = subtasks
        return Score(scores, len(truth), rows, matched.notes(), {"per_item": per_item}, marks, unavailable)


def _paired(truth: list[Row], file: str | Path) -> list[Row]:
    """Refuse an image with half a pair of questions; its points would double."""
    for image, count in Counter(row["question_id"] for row in truth).items():
        if count % 2:
            raise DataError(f"{file}: image {image!r} has {count} question(s), but MME asks two; is the file whole?")
    return truth


def _read_answers(file: Path) -> dict[str, str]:
    """Read one of MME's text files: question, tab, answer."""
    answers = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        parts = line.strip().split("\t")
        if len(parts) != 2 or not _ANSWER.accepts(parts[1]):
            raise DataError(
                f"{file}, line {number}: a question and an answer (Yes or No) with a tab between them are needed"
            )
        answers[core(parts[0])] = parts[1]
    return answers


def _subtask(name: str, items: Sequence[tuple[Any, str, str]]) -> dict[str, Any]:
    """Score (image, label, answer) triples; an image's two are neighbours."""
    pairs: list[tuple[Any, list[bool]]] = []
    for image, label, answer in items:
        if pairs and pairs[-1][0] == image and len(pairs[-1][1]) == 1:
            pairs[-1][1].append(label == answer)
        else:
            pairs.append((image, [label == answer]))
    counts = {"TP": ("yes", "yes"), "FN": ("yes", "no"), "TN": ("no", "no"), "FP": ("no", "yes")}
    judged = [(label, answer) for _, label, answer in items]
    found = {key: judged.count(value) for key, value in counts.items()}
    right = found["TP"] + found["TN"]
    accuracy = 100 * right / len(items)
    accuracy_plus = 100 * sum(all(both) for _, both in pairs) / len(pairs)
    positive, real = found["TP"] + found["FP"], found["TP"] + found["FN"]
    return {
        "type": _TYPE[name],
        "score": accuracy + accuracy_plus,
        "acc": accuracy,
        "acc_plus": accuracy_plus,
        **found,
        "other": len(items) - sum(found.values()),
        "precision": found["TP"] / positive if positive else 0.0,
        "recall": found["TP"] / real if real else 0.0,
    }
