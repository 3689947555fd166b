"""Answering a benchmark's questions: batched, resumable, on one or several processes.

Each answer is written to disk at once, so a killed run that is started again answers exactly the questions that are
left. Under ``torchrun`` each process takes questions as it has room for them, and process 0 puts the answers together.
"""

import hashlib
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed
from tqdm import tqdm

from tove_llava.checkpoints.weight_fingerprints import sampled_fingerprint
from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json_object, write_atomically
from tove_llava.eval.answering import MODES, Answer
from tove_llava.eval.benchmarks import Question
from tove_llava.eval.conditions import Condition
from tove_llava.eval.question_loader import QuestionLoader, portions
from tove_llava.eval.rows import AppendFile, Row, read_jsonl
from tove_llava.eval.tasks import Decoding, Task
from tove_llava.inference.generation import Answerer
from tove_llava.inference.sequences import has_plain_cache

T = TypeVar("T")


class Ranks:
    """The processes that ``torchrun`` started; by default only this one.

    Args:
        store: torch.distributed's, which all processes reach; None for a single process.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None) -> None:
        self.rank = rank
        self.world = world
        self._store = store
        self._counts: dict[str, int] = {}
        self._runs = 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Join the processes that ``torchrun`` started."""
        return _joined() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else cls()

    def wait(self) -> None:
        """Wait for every process; fail when one of them has died."""
        if self.world > 1:
            distributed.barrier()

    def begin(self) -> str:
        """Return a name for the next run's counters."""
        self._runs += 1
        return f"run{self._runs}"

    def add(self, counter: str, amount: int) -> int:
        """Add to a shared counter, and return its new value."""
        if self._store is not None:
            return int(self._store.add(f"tove_llava/{counter}", amount))
        self._counts[counter] = self._counts.get(counter, 0) + amount
        return self._counts[counter]

    def claim(self, counter: str, items: Sequence[T]) -> Iterator[T]:
        """Yield items that no other process has claimed."""
        while (number := self.add(counter, 1) - 1) < len(items):
            yield items[number]


@lru_cache(maxsize=1)
def _joined() -> Ranks:
    store, rank, world = next(distributed.rendezvous("env://"))
    # For waits only: no tensor is exchanged. A slow process may be hours later than a fast one.
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(days=1))
    return Ranks(rank, world, store)


@dataclass(frozen=True)
class Settings:
    """Settings of answering.

    Attributes:
        model_id: the model's name in every answer line.
        answering: registered name of the answering mode; by default ``generate``, or ``batches`` where that is
            impossible.
        batch_size: questions in the model at a time.
        workers: threads that open images.
        share: compute what prompts have in common once; False is for measuring what that gains.
    """

    model_id: str = ""
    answering: str | None = None
    batch_size: int = 32
    workers: int = 4
    share: bool = True


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        rows: answer lines of the questions asked, in order; none on processes other than the first.
        answered: questions that this run itself answered, on all processes; the others were answered before.
        images: images encoded for them.
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
        """Return entries of a report; rates are None without new answers."""
        per_second = [
            round(count / self.seconds, 3) if self.answered else None for count in (self.answered, self.images)
        ]
        return {
            "answering": self.answering,
            "decoding": asdict(self.decoding),
            "questions_answered": self.answered,
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "questions_per_second": per_second[0],
            "images_per_second": per_second[1],
            "peak_memory_bytes": self.peak_memory,
        }


def run_benchmark(
    answerer: Answerer,
    task: Task,
    folder: str | Path,
    condition: Condition,
    settings: Settings | None = None,
    ranks: Ranks | None = None,
    label: str | None = "",
) -> Run:
    """Answer the questions that have no answer yet.

    Args:
        folder: gets ``answers.jsonl`` (LLaVA's answer lines, in the questions' order) and ``run.json``.
        condition: what is done to the model and the images.
        ranks: the processes that share the work.
        label: heads the progress bar; None for no bar.

    Raises:
        ConfigError: the condition does not fit the model.
        DataError: an image cannot be read, or the folder holds answers of another model, data or condition.
    """
    ranks, settings, folder = ranks or Ranks(), settings or Settings(), Path(folder)
    rolling = task.decoding.num_beams == 1 and has_plain_cache(answerer.model)
    answering = settings.answering or ("generate" if rolling else "batches")
    identity = _identity(answerer, task, condition, settings.model_id, answering)
    counters = ranks.begin()
    with condition.applied(answerer.model):
        if ranks.rank == 0:
            _check_same_run(folder, identity)
        ranks.wait()
        known = _answered(folder, task.asked)
        ranks.wait()  # all have read the answers on disk before any process adds to them
        left = [question for question in task.asked if question.key not in known]
        started = time.monotonic()
        peak_memory(answerer.device, start=True)
        mode = MODES.get(answering)
        work = portions(left, settings.batch_size, ranks.world)
        with (
            QuestionLoader(
                answerer,
                ranks.claim(f"{counters}/claimed", work),
                options=task.benchmark.options if mode.needs_options else None,
                blank=condition.blank_image,
                workers=settings.workers,
                capacity=2 * settings.batch_size,
            ) as loader,
            AppendFile(folder / f"answers.part{ranks.rank}.jsonl") as out,
            _progress(task, len(known), label if left and ranks.rank == 0 else None) as bar,
        ):
            worker = mode(answerer, task.decoding, loader.features, settings.batch_size, settings.share)
            for answers in worker.run(loader.take):
                out.append(_row(answer, settings.model_id, identity) for answer in answers)
                bar.update(len(known) + ranks.add(f"{counters}/answered", len(answers)) - bar.n)
            ranks.add(f"{counters}/images", loader.encoded)
            ranks.wait()
            bar.update(len(task.asked) - bar.n)
    seconds = time.monotonic() - started
    rows = _finish(folder, task) if ranks.rank == 0 else []
    images = ranks.add(f"{counters}/images", 0)
    ranks.wait()
    return Run(rows, len(left), images, seconds, answering, task.decoding, peak_memory(answerer.device))


def _progress(task: Task, known: int, label: str | None) -> Any:
    """Return a bar over the questions asked; a log gets few updates."""
    return tqdm(
        total=len(task.asked),
        initial=known,
        desc=label,
        unit="q",
        mininterval=0.5 if sys.stderr.isatty() else 15,
        disable=label is None,
    )


def _row(answer: Answer, model_id: str, identity: Mapping[str, Any]) -> Row:
    """Make LLaVA's answer line; its id depends on run and question."""
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


def _finish(folder: Path, task: Task) -> list[Row]:
    """Join all parts in ``answers.jsonl`` and return the rows asked for.

    The file keeps earlier answers to questions that are not asked now.
    """
    answers = _answered(folder, task.questions)
    lost = [question.question_id for question in task.asked if question.key not in answers]
    if lost:
        raise DataError(
            f"{folder}: the answers to {len(lost)} questions are not there (the first is {lost[0]!r}); all processes "
            "must see the same --output folder"
        )
    rows = [answers[question.key] for question in task.questions if question.key in answers]
    write_atomically(folder / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for part in folder.glob("answers.part*.jsonl"):
        part.unlink()
    return [answers[question.key] for question in task.asked]


def answer_files(folder: Path) -> list[Path]:
    """List a folder's files of answers, a finished run's first."""
    return sorted([*folder.glob("answers.jsonl"), *folder.glob("answers.part*.jsonl")])


def _answered(folder: Path, questions: Sequence[Question]) -> dict[tuple[int | str, str], Row]:
    """Read whole lines of answers to these questions, by their key."""
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


def _identity(answerer: Answerer, task: Task, condition: Condition, model_id: str, answering: str) -> Row:
    """Describe a run; answers are only reused under the same description."""
    digest = hashlib.sha256()
    for question in sorted(task.questions, key=lambda question: str(question.key)):
        digest.update(json.dumps([question.question_id, question.text, question.image_names]).encode())
    return {
        "benchmark": type(task.benchmark).__name__,
        "questions": digest.hexdigest(),
        "model": model_id,
        "weights": sampled_fingerprint(answerer.model),
        "template": answerer.template.name,
        "image_aspect_ratio": answerer.transform.aspect_ratio,
        "dtype": str(answerer.model.dtype).removeprefix("torch."),
        "blank_image": condition.blank_image,
        "detach": list(condition.detach),
        "answering": answering,
        "decoding": asdict(task.decoding),
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
    """Return the most bytes that torch reserved on a GPU since the last ``start``."""
    if device.type != "cuda":
        return None
    if start:
        torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.max_memory_reserved(device))
