"""Answering a benchmark's questions: batched, resumable, on one or several processes.

Answers are on disk as soon as they are there, so a killed run that is started again answers exactly the questions that
are left. Under ``torchrun`` processes take questions as they have room for them, and process 0 puts the answers
together.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tove_llava.checkpoints.weight_fingerprints import sampled_fingerprint
from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json_object, write_atomically
from tove_llava.eval.answering import MODES, Answer
from tove_llava.eval.benchmarks import Benchmark, Question
from tove_llava.eval.conditions import Condition
from tove_llava.eval.progress import Progress
from tove_llava.eval.question_loader import QuestionLoader, portions
from tove_llava.eval.ranks import Ranks
from tove_llava.eval.rows import AppendFile, Row, read_jsonl
from tove_llava.eval.tasks import Decoding
from tove_llava.inference.generation import Answerer
from tove_llava.inference.sequences import has_plain_cache

Key = tuple[int | str, str]  # see Question.key


@dataclass(frozen=True)
class Settings:
    """How questions are answered.

    Attributes:
        decoding: the benchmark's own by default.
        answering: registered name of the answering mode; by default ``generate``, or ``batches`` where that cannot be.
        batch_size: questions in the model at a time.
        workers: threads that open pictures.
        share: compute what prompts have in common once; False is for measuring what that gains.
    """

    decoding: Decoding | None = None
    answering: str | None = None
    batch_size: int = 32
    workers: int = 4
    share: bool = True


@dataclass(frozen=True)
class Run:
    """What a run did.

    Attributes:
        rows: answer lines of the questions asked, in order; none on processes other than the first.
        answered: questions that this run itself answered, on all processes; the others were answered before.
        images: pictures encoded for them.
        seconds: time that it took, without loading the model.
        answering: name of the answering mode.
        decoding: settings of the generation.
        peak_memory: most bytes that this process held on its GPU; None without one.
    """

    rows: list[Row] = field(repr=False)
    answered: int
    images: int
    seconds: float
    answering: str
    decoding: Decoding
    peak_memory: int | None

    def record(self) -> dict[str, Any]:
        """Entries of a report; rates are null where nothing was left to answer."""
        return {
            "answering": self.answering,
            "decoding": self.decoding.to_dict(),
            "questions_answered": self.answered,
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "questions_per_second": self._rate(self.answered),
            "images_per_second": self._rate(self.images),
            "peak_memory_bytes": self.peak_memory,
        }

    def _rate(self, amount: int) -> float | None:
        return round(amount / self.seconds, 3) if self.answered else None


def run_benchmark(
    answerer: Answerer,
    benchmark: Benchmark,
    questions: Sequence[Question],
    folder: str | Path,
    condition: Condition,
    settings: Settings | None = None,
    limit: int | None = None,
    ranks: Ranks | None = None,
    model_id: str = "",
    label: str | None = "",
) -> Run:
    """Answer the questions that have no answer yet.

    Args:
        questions: all questions of the benchmark.
        folder: gets ``answers.jsonl`` (LLaVA's answer lines, in the questions' order) and ``run.json``.
        condition: what is done to the model and the images.
        limit: answer about this many of the questions, spread evenly over the file; see :meth:`Benchmark.limited`.
        ranks: the processes that share the work; this one alone by default.
        model_id: stands in every answer line.
        label: heads the progress lines; None for no such lines.

    Raises:
        ConfigError: the benchmark is not multiple choice, and the answering mode needs options.
        DataError: an image cannot be read, or the folder holds answers of another model, data or condition.
    """
    ranks, settings, folder = ranks or Ranks(), settings or Settings(), Path(folder)
    decoding = settings.decoding or Decoding.of(benchmark)
    rolling = decoding.num_beams == 1 and has_plain_cache(answerer.model)
    answering = settings.answering or ("generate" if rolling else "batches")
    mode = MODES.get(answering)
    identity = {
        **_identity(answerer, benchmark, questions, condition, model_id),
        "answering": answering,
        "decoding": decoding.to_dict(),
    }
    condition.check(answerer.model)
    if ranks.rank == 0:
        _check_same_run(folder, identity)
    ranks.wait()
    asked = benchmark.limited(questions, limit)
    answered = _answered(folder, asked)
    ranks.wait()  # all have read what is there before anyone writes more
    left = [question for question in asked if question.key not in answered]
    name = ranks.begin()
    started = time.monotonic()
    peak_memory(answerer.device, start=True)
    with (
        condition.applied(answerer.model),
        QuestionLoader(
            answerer,
            portions(left, settings.batch_size, ranks.world),
            claim=lambda: ranks.add(f"{name}/claimed", 1) - 1,
            options=benchmark.options if mode.needs_options else lambda _: {},
            blank=condition.blank_image,
            workers=settings.workers,
            capacity=2 * settings.batch_size,
        ) as feed,
        AppendFile(folder / f"answers.part{ranks.rank}.jsonl") as out,
        Progress(len(left), label or "", shown=ranks.rank == 0 and label is not None) as progress,
    ):
        worker = mode(answerer, decoding, feed.features, settings.batch_size, settings.share)
        for answers in worker.run(feed.take):
            out.append(_row(answer, model_id, identity) for answer in answers)
            progress.update(ranks.add(f"{name}/answered", len(answers)))
    ranks.add(f"{name}/images", feed.encoded)
    ranks.wait()
    seconds = time.monotonic() - started
    rows = _finish(folder, questions, asked) if ranks.rank == 0 else []
    images = ranks.add(f"{name}/images", 0)
    ranks.wait()
    return Run(rows, len(left), images, seconds, answering, decoding, peak_memory(answerer.device))


def _row(answer: Answer, model_id: str, identity: Mapping[str, Any]) -> Row:
    """LLaVA's answer line. Its id is of the run and the question, so that a restarted run gives the same file."""
    question = answer.question
    name = json.dumps([identity, question.key], sort_keys=True)
    return {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": answer.text,
        "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, name).hex,
        "model_id": model_id,
        "metadata": {**question.metadata, **answer.metadata},
    }


def _finish(folder: Path, questions: Sequence[Question], asked: Sequence[Question]) -> list[Row]:
    """Put all parts together in ``answers.jsonl``, which keeps answers to questions not asked now; those asked."""
    answers = _answered(folder, questions)
    lost = [question.question_id for question in asked if question.key not in answers]
    if lost:
        raise DataError(
            f"{folder}: the answers to {len(lost)} questions are not there (the first is {lost[0]!r}); all processes "
            "must see the same --output folder"
        )
    rows = [answers[question.key] for question in questions if question.key in answers]
    write_atomically(folder / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for part in folder.glob("answers.part*.jsonl"):
        part.unlink()
    return [answers[question.key] for question in asked]


def answer_files(folder: Path) -> list[Path]:
    """Files with answers in a run's folder, those of a finished run first. A judge's replies lie beside them."""
    return sorted([*folder.glob("answers.jsonl"), *folder.glob("answers.part*.jsonl")])


def _answered(folder: Path, questions: Sequence[Question]) -> dict[Key, Row]:
    """Answers on disk to any of the questions; a last line that was cut off is not an answer."""
    asked = {question.key for question in questions}
    rows: list[Row] = []
    for file in answer_files(folder):
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
        "weights": sampled_fingerprint(answerer.model),
        "template": answerer.template.name,
        "image_aspect_ratio": answerer.transform.aspect_ratio,
        "dtype": str(answerer.model.dtype).removeprefix("torch."),
        "blank_image": condition.blank_image,
        "detach": list(condition.detach),
    }


def _check_same_run(folder: Path, identity: Row) -> None:
    file = folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    if file.exists():
        recorded = read_json_object(file, DataError)
        changed = [key for key, value in identity.items() if recorded.get(key) != value]
        if changed:
            raise DataError(
                f"{folder} holds the answers of another run ({', '.join(changed)} differ); choose another --output, "
                "or give --overwrite to throw them away"
            )
    elif answer_files(folder):
        raise DataError(f"{folder} holds answers without a run.json; choose another --output, or give --overwrite")
    write_atomically(file, json.dumps(identity, indent=1) + "\n")


def forget(folder: str | Path) -> None:
    """Delete the answers of an earlier run, and nothing else."""
    for file in [*answer_files(Path(folder)), Path(folder) / "run.json"]:
        file.unlink(missing_ok=True)


def peak_memory(device: torch.device, start: bool = False) -> int | None:
    """Most bytes of tensors on a GPU at a time since the last ``start``; None on the CPU."""
    if device.type != "cuda":
        return None
    if start:
        torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.max_memory_allocated(device))
