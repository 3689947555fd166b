"""Questions on their way to the model: in which order, which process takes them, and their pictures."""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tove_llava.core.errors import DataError
from tove_llava.data import IMAGE_PLACEHOLDER, Turn
from tove_llava.eval.answering import Job
from tove_llava.eval.benchmarks import Question
from tove_llava.eval.embedded_image import EmbeddedImage
from tove_llava.inference.generation import Answerer

Picture = Path | EmbeddedImage
Options = Callable[[Question], Mapping[str, str]]


def portions(questions: Sequence[Question], batch_size: int, world: int = 1) -> list[list[Question]]:
    """Questions in the order in which they are best answered, cut into portions that processes take one by one.

    Questions about one picture stay together, so that it is encoded once. Long questions come first: neighbours are
    of like length, and what does not fit into memory shows at once. Portions shrink towards the end, so that all
    processes finish at about the same time.
    """
    groups: dict[Hashable, list[Question]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(("text", place) if question.image is None else question.image, []).append(question)
    ordered = [sorted(group, key=_length, reverse=True) for group in groups.values()]
    # Questions without a picture share nothing with the others, and so stay apart.
    ordered.sort(key=lambda group: (group[0].image is None, -_length(group[0])))
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


def _length(question: Question) -> int:
    return len(question.text)


class QuestionLoader:
    """Hands out questions, with pictures opened ahead in other threads.

    Args:
        portions: of all processes, in order.
        claim: gives the number of the next portion, each number to one process only.
        options: options of a multiple-choice question.
        blank: replace every picture by the mean colour.
        workers: threads that open pictures.
        capacity: pictures whose features are kept for later questions.
    """

    def __init__(
        self,
        answerer: Answerer,
        portions: Sequence[Sequence[Question]],
        claim: Callable[[], int],
        options: Options,
        blank: bool = False,
        workers: int = 4,
        capacity: int = 64,
    ) -> None:
        self.answerer = answerer
        self.options = options
        self.blank = blank
        self.capacity = capacity
        self.encoded = 0  # pictures
        self.image_tokens = answerer.num_image_tokens
        self._portions = _claimed(portions, claim)
        self._queue: deque[Question] = deque()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pictures")
        self._opening: dict[Picture, Future[Tensor]] = {}
        self._known: OrderedDict[Picture, Tensor] = OrderedDict()  # the least recently used comes first

    def __enter__(self) -> "QuestionLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, count: int) -> list[Job]:
        """The next questions, at most ``count``; none when there are no more.

        Raises:
            DataError: a question is too long for the model.
        """
        while len(self._queue) < count and self._claim():
            pass
        if len(self._queue) < 2 * count:
            self._claim()  # the pictures of one portion are opened while the model works on the one before
        return [self._job(self._queue.popleft()) for _ in range(min(count, len(self._queue)))]

    def features(self, jobs: Sequence[Job]) -> list[Tensor | None]:
        """[N, D] of each question's picture, None for questions without.

        Raises:
            DataError: a picture cannot be read; the question is named.
        """
        new = {}
        for job in jobs:
            image = job.question.image
            if image is not None and image not in self._known and image not in new:
                new[image] = self._pixels(job.question)
        if new:
            stack = torch.stack(list(new.values()))
            features = self.answerer.features(torch.zeros_like(stack) if self.blank else stack)
            self._known.update(zip(new, features, strict=True))
            self.encoded += len(new)
        result = [None if job.question.image is None else self._known[job.question.image] for job in jobs]
        for job in jobs:
            if job.question.image is not None:
                self._known.move_to_end(job.question.image)
                self._opening.pop(job.question.image, None)
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)
        return result

    def _claim(self) -> bool:
        """Whether there was another portion."""
        portion = next(self._portions, None)
        if portion is None:
            return False
        for question in portion:
            if question.image is not None and question.image not in self._known:
                self._open(question.image)
        self._queue += portion
        return True

    def _open(self, image: Picture) -> "Future[Tensor]":
        if image not in self._opening:
            self._opening[image] = self._pool.submit(self._read, image)
        return self._opening[image]

    def _read(self, image: Picture) -> Tensor:
        return self.answerer.pixels(image.open() if isinstance(image, EmbeddedImage) else image)

    def _pixels(self, question: Question) -> Tensor:
        assert question.image is not None
        try:
            return self._open(question.image).result()
        except DataError as error:
            raise DataError(f"question {question.question_id!r}: {error}") from error

    def _job(self, question: Question) -> Job:
        try:
            return Job(question, prompt_ids(self.answerer, question, self.image_tokens), self.options(question))
        except DataError as error:
            raise DataError(f"question {question.question_id!r}: {error}") from error


def _claimed(portions: Sequence[Sequence[Question]], claim: Callable[[], int]) -> Iterator[Sequence[Question]]:
    while (number := claim()) < len(portions):
        yield portions[number]


def prompt_ids(answerer: Answerer, question: Question, image_tokens: int | None = None) -> list[int]:
    """Ids of a question as LLaVA asks it: the picture, a line break, the words.

    Args:
        image_tokens: as :meth:`Answerer.encode` takes it.

    Raises:
        DataError: it leaves the model no room for an answer.
    """
    if question.image is None:
        return answerer.encode([Turn("user", question.text)], num_images=0)
    text = question.text.replace(IMAGE_PLACEHOLDER, "").strip()
    return answerer.encode([Turn("user", f"{IMAGE_PLACEHOLDER}\n{text}")], num_images=1, image_tokens=image_tokens)
