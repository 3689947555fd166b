"""Answering a benchmark's questions: batched, resumable, on one or several processes.

Every answer is on disk before the next batch starts, so a killed run that is started again answers exactly the
questions that are left. Under ``torchrun`` each process takes its share, and process 0 puts the answers together.
"""

import hashlib
import json
import os
import sys
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, distributed
from tqdm import tqdm

from tove_llava.data import IMAGE_PLACEHOLDER, Turn
from tove_llava.errors import DataError
from tove_llava.eval.benchmarks import Benchmark, Question
from tove_llava.eval.conditions import Condition
from tove_llava.eval.pictures import EmbeddedPicture
from tove_llava.eval.rows import AppendFile, Row, read_jsonl, write_atomically
from tove_llava.llava.fingerprints import fingerprint
from tove_llava.serve.generation import Answerer

T = TypeVar("T")
Picture = Path | EmbeddedPicture
Key = tuple[int | str, str]  # see Question.key

# Questions are taken in file order, where those about one image are neighbours, and sorted by length within a window of
# this many batches: little padding, and an image's features are still at hand for its next question.
WINDOW = 16


@dataclass(frozen=True)
class Share:
    """Which part of the work this process does."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Share":
        """The share that ``torchrun`` assigns; joins its process group for the waits between steps."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if not distributed.is_initialized():
            # Waits only: no tensor is exchanged. A slow process may be hours behind a fast one.
            distributed.init_process_group("gloo", timeout=timedelta(days=1))
        return cls(distributed.get_rank(), world)

    def wait(self) -> None:
        if self.world > 1:
            distributed.barrier()


def run_benchmark(
    answerer: Answerer,
    benchmark: Benchmark,
    questions: Sequence[Question],
    folder: str | Path,
    condition: Condition,
    batch_size: int = 16,
    limit: int | None = None,
    share: Share | None = None,
    model_id: str = "",
    label: str = "",
) -> list[Row]:
    """Answer the questions that have no answer yet.

    Args:
        questions: all questions of the benchmark.
        folder: gets ``answers.jsonl`` (LLaVA's answer lines, in the questions' order) and ``run.json``.
        condition: what is done to the model and the images.
        limit: answer this many of the questions, spread evenly over the file.
        share: this process's part; the whole by default.
        model_id: stands in every answer line.
        label: heads the progress bar.

    Returns:
        on process 0 the answers in the questions' order, elsewhere an empty list.

    Raises:
        DataError: an image cannot be read, or the folder holds answers of another model, data or condition.
    """
    share = share or Share()
    folder = Path(folder)
    if share.rank == 0:
        _check_same_run(folder, _identity(answerer, benchmark, questions, condition, model_id))
    share.wait()
    questions = spread(questions, limit)
    answered = _answered(folder, questions)
    share.wait()  # all have read what is there before anyone writes more
    left = [question for question in questions if question.key not in answered]
    mine = left[share.rank :: share.world]
    interval = 0.5 if sys.stderr.isatty() else 15.0  # seconds; a log file does not need every update
    with AppendFile(folder / f"answers.part{share.rank}.jsonl") as out, condition.applied(answerer.model):
        progress = tqdm(
            total=len(mine), desc=label, unit="q", disable=share.rank != 0 or not mine, mininterval=interval
        )
        with progress:
            for batch, texts, prompts in _answer(answerer, benchmark, mine, condition, batch_size):
                out.append(
                    {
                        "question_id": question.question_id,
                        "prompt": prompt,
                        "text": text,
                        "answer_id": uuid.uuid4().hex,
                        "model_id": model_id,
                        "metadata": dict(question.metadata),
                    }
                    for question, text, prompt in zip(batch, texts, prompts, strict=True)
                )
                progress.update(len(batch))
    share.wait()
    if share.rank != 0:
        share.wait()
        return []
    answers = _answered(folder, questions)
    rows = [answers[question.key] for question in questions]
    write_atomically(folder / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for part in folder.glob("answers.part*.jsonl"):
        part.unlink()
    share.wait()
    return rows


def spread(questions: Sequence[T], limit: int | None) -> list[T]:
    """``limit`` of the questions at even distances (all, without a limit), so that every category has its share."""
    if limit is None or limit >= len(questions):
        return list(questions)
    return [questions[index * len(questions) // limit] for index in range(limit)]


def _answer(
    answerer: Answerer, benchmark: Benchmark, questions: Sequence[Question], condition: Condition, batch_size: int
) -> Iterator[tuple[list[Question], list[str], list[str]]]:
    """Batches with their answers. The next batch's pictures are opened while the model answers this one."""
    prompts = {question.key: _prompt(answerer, question) for question in questions}
    batches = _batches(questions, {key: len(ids) for key, ids in prompts.items()}, batch_size)
    features = _Features(answerer, condition.blank_image, capacity=WINDOW * batch_size)
    with ThreadPoolExecutor(max_workers=2) as pool:
        opened = None
        for index, batch in enumerate(batches):
            pixels = opened.result() if opened is not None else features.open(batch)
            opened = pool.submit(features.open, batches[index + 1]) if index + 1 < len(batches) else None
            texts = answerer.generate(
                [prompts[question.key] for question in batch],
                features.of(batch, pixels),
                benchmark.max_new_tokens,
            )
            yield batch, texts, [question.text for question in batch]


def _prompt(answerer: Answerer, question: Question) -> list[int]:
    text = question.text.replace(IMAGE_PLACEHOLDER, "").strip() if question.image else question.text
    turn = Turn("user", f"{IMAGE_PLACEHOLDER}\n{text}" if question.image else text)
    try:
        return answerer.encode([turn], num_images=int(question.image is not None))
    except DataError as error:
        raise DataError(f"question {question.question_id!r}: {error}") from error


def _batches(questions: Sequence[Question], lengths: dict[Key, int], batch_size: int) -> list[list[Question]]:
    batches = []
    for start in range(0, len(questions), WINDOW * batch_size):
        window = sorted(questions[start : start + WINDOW * batch_size], key=lambda question: -lengths[question.key])
        batches += [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
    return batches


class _Features:
    """What the language model reads of each image, computed once for the questions of a window."""

    def __init__(self, answerer: Answerer, blank: bool, capacity: int) -> None:
        self.answerer = answerer
        self.blank = blank
        self.capacity = capacity
        self.known: OrderedDict[Picture, Tensor] = OrderedDict()  # the least recently used comes first

    def open(self, batch: Sequence[Question]) -> dict[Picture, Tensor]:
        """float32 [3, S, S] of the batch's images that are not known (from another thread: opens files only)."""
        pixels: dict[Picture, Tensor] = {}
        for question in batch:
            if question.image is None or question.image in pixels or question.image in self.known:
                continue
            try:
                pixels[question.image] = self._pixels(question.image)
            except DataError as error:
                raise DataError(f"question {question.question_id!r}: {error}") from error
        return pixels

    def _pixels(self, image: Picture) -> Tensor:
        return self.answerer.pixels(image.open() if isinstance(image, EmbeddedPicture) else image)

    def of(self, batch: Sequence[Question], pixels: dict[Picture, Tensor]) -> list[Tensor]:
        """[N, D] of every image of the batch, in order."""
        wanted = [question.image for question in batch if question.image is not None]
        # An image that was known when the batch was opened may have been dropped since.
        new = [image for image in dict.fromkeys(wanted) if image not in self.known]
        if new:
            stack = torch.stack([pixels[image] if image in pixels else self._pixels(image) for image in new])
            stack = torch.zeros_like(stack) if self.blank else stack
            self.known.update(zip(new, self.answerer.features(stack), strict=True))
        for image in wanted:
            self.known.move_to_end(image)
        result = [self.known[image] for image in wanted]
        while len(self.known) > self.capacity:
            self.known.popitem(last=False)
        return result


def _answered(folder: Path, questions: Sequence[Question]) -> dict[Key, Row]:
    """Answers on disk to any of the questions; a last line that was cut off is not an answer."""
    asked = {question.key for question in questions}
    rows: list[Row] = []
    for file in sorted(folder.glob("answers*.jsonl")):
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) != len(content):
            os.truncate(file, len(whole))
        rows += read_jsonl(file, required=("question_id", "prompt", "text"))
    answers = {(row["question_id"], row["prompt"]): row for row in rows}  # the last of several counts
    return {key: row for key, row in answers.items() if key in asked}


def _identity(
    answerer: Answerer, benchmark: Benchmark, questions: Sequence[Question], condition: Condition, model_id: str
) -> Row:
    """What must agree before answers of an earlier run are used."""
    digest = hashlib.sha256()
    for question in sorted(questions, key=lambda question: str(question.key)):
        image = question.image.name if question.image else None
        digest.update(json.dumps([question.question_id, question.text, image]).encode())
    return {
        "benchmark": type(benchmark).__name__,
        "questions": digest.hexdigest(),
        "model": model_id,
        "weights": fingerprint(answerer.model),
        "template": answerer.template.name,
        "image_aspect_ratio": answerer.transform.aspect_ratio,
        "max_new_tokens": benchmark.max_new_tokens,
        "blank_image": condition.blank_image,
        "detach": list(condition.detach),
    }


def _check_same_run(folder: Path, identity: Row) -> None:
    file = folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    if file.exists():
        recorded = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key, value in identity.items() if recorded.get(key) != value]
        if changed:
            raise DataError(
                f"{folder} holds the answers of another run ({', '.join(changed)} differ); choose another --output, "
                "or give --overwrite to throw them away"
            )
    elif any(folder.glob("answers*.jsonl")):
        raise DataError(f"{folder} holds answers without a run.json; choose another --output, or give --overwrite")
    write_atomically(file, json.dumps(identity, indent=1) + "\n")


def forget(folder: str | Path) -> None:
    """Delete the answers of an earlier run, and nothing else."""
    for file in [*Path(folder).glob("answers*.jsonl"), Path(folder) / "run.json"]:
        file.unlink(missing_ok=True)
