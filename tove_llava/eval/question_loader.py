"""Questions on their way to the model: their order, and their images."""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tove_llava.core.errors import DataError
from tove_llava.data import IMAGE_PLACEHOLDER, Turn
from tove_llava.eval.answering import Job
from tove_llava.eval.benchmarks import EmbeddedImage, Question
from tove_llava.inference.generation import Answerer

Image = Path | EmbeddedImage


def portions(questions: Sequence[Question], batch_size: int, world: int = 1) -> list[list[Question]]:
    """Order questions and cut them into portions for processes to take.

    Questions about one image stay together, so that it is encoded once. Long questions come first: neighbours are of
    similar length, and a batch that does not fit into memory fails early. Portions shrink towards the end, so that all
    processes finish at about the same time.
    """

    def length(question: Question) -> int:
        return len(question.text)

    groups: dict[Hashable, list[Question]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(("text", index) if question.image is None else question.image, []).append(question)
    ordered = [sorted(group, key=length, reverse=True) for group in groups.values()]
    # Questions without an image share no prefix with the others, so they come last.
    ordered.sort(key=lambda group: (group[0].image is None, -length(group[0])))
    pieces = [group[start : start + batch_size] for group in ordered for start in range(0, len(group), batch_size)]
    result: list[list[Question]] = [[]]
    left = len(questions)
    for piece in pieces:
        wanted = min(batch_size, -(-left // (2 * world)))
        if result[-1] and len(result[-1]) + len(piece) > wanted:
            result.append([])
        result[-1] += piece
        left -= len(piece)
    return [portion for portion in result if portion]


class QuestionLoader:
    """A source of questions whose images are opened ahead in other threads.

    Args:
        portions: those that this process takes, in order.
        options: gives the options of a multiple-choice question, for answering modes that need them.
        blank: replace every image by the mean colour.
        workers: threads that open images.
        capacity: images whose features are kept for later questions.
    """

    def __init__(
        self,
        answerer: Answerer,
        portions: Iterable[Sequence[Question]],
        options: Callable[[Question], Mapping[str, str]] | None = None,
        blank: bool = False,
        workers: int = 4,
        capacity: int = 64,
    ) -> None:
        self.answerer = answerer
        self.options = options
        self.blank = blank
        self.capacity = capacity
        self.encoded = 0  # images
        self.image_tokens = answerer.num_image_tokens
        self._portions = iter(portions)
        self._queue: deque[Question] = deque()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
        self._opening: dict[Image, Future[Tensor]] = {}
        self._known: OrderedDict[Image, Tensor] = OrderedDict()  # the least recently used comes first

    def __enter__(self) -> "QuestionLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, count: int) -> list[Job]:
        """Return the next questions, at most ``count``; none when all are taken.

        Raises:
            DataError: a question is too long for the model.
        """
        while len(self._queue) < count and self._load_portion():
            pass
        if len(self._queue) < 2 * count:
            self._load_portion()  # its images are opened while the model works on the previous portion
        jobs = []
        for question in (self._queue.popleft() for _ in range(min(count, len(self._queue)))):
            with _named(question):
                prompt = prompt_ids(self.answerer, question, self.image_tokens)
            jobs.append(Job(question, prompt, self.options(question) if self.options else {}))
        return jobs

    def features(self, jobs: Sequence[Job]) -> list[list[Tensor]]:
        """Return [N, D] of each image of each question.

        Raises:
            DataError: an image cannot be read; the question is named.
        """
        new = {}
        for job in jobs:
            for image in job.question.images:
                if image not in self._known and image not in new:
                    with _named(job.question):
                        new[image] = self._open(image).result()
        if new:
            stack = torch.stack(list(new.values()))
            features = self.answerer.features(torch.zeros_like(stack) if self.blank else stack)
            self._known.update(zip(new, features, strict=True))
            self.encoded += len(new)
        result = [[self._known[image] for image in job.question.images] for job in jobs]
        for image in (image for job in jobs for image in job.question.images):
            self._known.move_to_end(image)
            self._opening.pop(image, None)
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)
        return result

    def _load_portion(self) -> bool:
        """Queue the next portion and open its images; False without one."""
        portion = next(self._portions, None)
        if portion is None:
            return False
        for question in portion:
            for image in question.images:
                if image not in self._known:
                    self._open(image)
        self._queue += portion
        return True

    def _open(self, image: Image) -> "Future[Tensor]":
        def read() -> Tensor:
            return self.answerer.pixels(image.open() if isinstance(image, EmbeddedImage) else image)

        if image not in self._opening:
            self._opening[image] = self._pool.submit(read)
        return self._opening[image]


@contextmanager
def _named(question: Question) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"question {question.question_id!r}: {error}") from error


def prompt_ids(answerer: Answerer, question: Question, image_tokens: int | None = None) -> list[int]:
    """Encode a question as LLaVA does: each image with a line break, then the words.

    Args:
        image_tokens: as :meth:`Answerer.encode` takes it.

    Raises:
        DataError: it leaves the model no room for an answer.
    """
    count = len(question.images)
    if not count:
        return answerer.encode([Turn("user", question.text)], num_images=0)
    text = question.text.replace(IMAGE_PLACEHOLDER, "").strip()
    turn = Turn("user", f"{IMAGE_PLACEHOLDER}\n" * count + text)
    return answerer.encode([turn], num_images=count, image_tokens=image_tokens)
