"""The one thread that runs the model: a bounded queue in front, a batch that answers join and leave between tokens."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from tove_llava.core.errors import AnswerError, BusyError, ToveError
from tove_llava.inference.replies import Request
from tove_llava.inference.rolling_batch import Batch

T = TypeVar("T")

FULL = (torch.OutOfMemoryError, MemoryError)
# After so many answers without trouble one more may run at a time again.
CALM = 16

log = logging.getLogger(__name__)


class Worker:
    """Answers requests with one batch, and runs other jobs of the model between two tokens.

    When the device's memory is full, fewer answers run at a time: those that were running go back to the front of the
    queue with what they have, and go on later. One that does not fit alone fails.

    Args:
        batch: used by this thread alone.
        max_batch: answers at a time.
        max_waiting: requests in the queue.
    """

    def __init__(self, batch: Batch, max_batch: int, max_waiting: int) -> None:
        self._batch = batch
        self._most = self._room = min(max_batch, batch.limit or max_batch)
        self._max_waiting = max_waiting
        self._calm = 0
        self._waiting: deque[Request] = deque()
        self._jobs: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    # -- for any thread ------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        with self._changed:
            return sum(request.live for request in self._waiting)

    @property
    def running(self) -> int:
        """Answers in the making."""
        return len(self._batch.live)

    def check_room(self) -> None:
        """Raises BusyError when no further request would be taken."""
        with self._changed:
            self._check_open()
            self._waiting = deque(request for request in self._waiting if request.live)  # who has gone holds no place
            if len(self._waiting) >= self._max_waiting:
                raise BusyError(f"{self._max_waiting} questions are waiting already; try again in a moment")

    def submit(self, request: Request) -> None:
        """Put a request into the queue.

        Raises:
            BusyError: it is full, or the worker is closed.
        """
        with self._changed:
            self.check_room()
            self._waiting.append(request)
            self._wake()

    def run(self, job: Callable[[], T]) -> T:
        """What ``job`` returns, which the worker calls between two tokens.

        Raises:
            BusyError: too many jobs are waiting, or the worker is closed.
        """
        future: Future[object] = Future()
        with self._changed:
            self._check_open()
            if len(self._jobs) >= self._max_waiting:
                raise BusyError(f"{self._max_waiting} requests are waiting already; try again in a moment")
            self._jobs.append((job, future))
            self._wake()
        return future.result()  # type: ignore[return-value]

    def position(self, request: Request) -> int:
        """Place in the queue, from 1; 0 for a request that is not in it."""
        with self._changed:
            ahead = [each for each in self._waiting if each.live or each is request]
            return ahead.index(request) + 1 if request in ahead else 0

    def cancel(self, request: Request) -> None:
        """Nobody waits for this request any more."""
        request.cancelled = True
        request.events.put(None)  # whoever reads in another thread
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)

    def close(self, patience: float) -> None:
        """Take no more requests, fail those in the queue, and let running answers end for ``patience`` seconds."""
        with self._changed:
            self._closing = True
            self._refuse_waiting()
            while self._jobs:
                self._jobs.popleft()[1].set_exception(BusyError("the engine was shut down"))
            self._changed.notify_all()
        if self._thread is None or self._thread is threading.current_thread():
            return
        self._thread.join(timeout=patience)
        for request in list(self._batch.rows):
            request.finish(BusyError("the engine was shut down before this answer's end"))
        self._thread.join()

    def _refuse_waiting(self) -> None:
        while self._waiting:
            self._waiting.popleft().finish(BusyError("the engine was shut down before this question's turn"))

    def _check_open(self) -> None:
        if self._closing:
            raise BusyError("the engine is shut down")

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tove-llava engine", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    # -- for the worker's thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Waits for work and does a bit of it; False when it was the last. In between it holds nobody's pictures."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            if self._closing and not self._batch.live:
                self._refuse_waiting()  # that came back because the memory was full
                return False
            jobs, requests = list(self._jobs), self._next()
            self._jobs.clear()
        for job, future in jobs:
            _settle(job, future)
        if requests:
            self._join(requests)
        if self._batch.rows:
            self._step()
        return True

    def _has_work(self) -> bool:
        return bool(self._waiting or self._jobs or self._batch.rows or self._closing)

    def _next(self) -> list[Request]:
        """Takes from the queue as many as there is room for."""
        requests: list[Request] = []
        while self._waiting and len(requests) < self._room - len(self._batch.live):
            request = self._waiting.popleft()
            if request.live:
                requests.append(request)
        return requests

    def _join(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.begin()
        failure = _failure(lambda: self._batch.join(requests))
        if isinstance(failure, FULL):
            self._make_room(requests, len(self._batch.live))
        elif failure is not None and len(requests) > 1:
            for request in requests:  # whose fault it is shows when each is alone
                self._join([request])
        elif failure is not None:
            requests[0].finish(_explained(failure))
        self._count()

    def _step(self) -> None:
        failure = _failure(self._batch.step)
        if isinstance(failure, FULL):
            self._make_room(self._batch.abandon(), 0)
        elif failure is not None:
            for request in self._batch.abandon():
                request.finish(_explained(failure))
        self._count()

    def _make_room(self, requests: Sequence[Request], running: int) -> None:
        """The memory was full with ``requests``, beside others that go on running."""
        together = running + len(requests)
        if requests and together == 1:
            requests[0].finish(
                AnswerError(
                    "the device's memory is full with this question alone; use fewer pictures, a shorter conversation "
                    "or a smaller --dtype"
                )
            )
        elif requests:
            self._room, self._calm = max(1, together // 2), 0
            with self._changed:
                self._waiting.extendleft(reversed(requests))
            log.warning("the device's memory is full; going on with %d answers at a time", self._room)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _count(self) -> None:
        self._calm += sum(row.ended for row in self._batch.rows)
        if self._calm >= CALM and self._room < self._most:
            self._room, self._calm = self._room + 1, 0


def _failure(work: Callable[[], object]) -> Exception | None:
    """What ``work`` raises, without the frames, which would hold their tensors."""
    try:
        work()
    except FULL as error:
        return error.with_traceback(None)
    except Exception as error:
        if not isinstance(error, ToveError):
            log.exception("an answer failed")
        return error.with_traceback(None)
    return None


def _explained(error: Exception) -> ToveError:
    """An error of its own for each request: callers raise it in threads of their own."""
    if isinstance(error, ToveError):
        return type(error)(*error.args)
    failed = AnswerError(f"the answer failed in the program ({type(error).__name__}: {error}); its log says where")
    failed.__cause__ = error
    return failed


def _settle(job: Callable[[], object], future: "Future[object]") -> None:
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
