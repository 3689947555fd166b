"""The one thread that runs the model, its queue and its batch."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from tove_llava.core.errors import AnswerError, BusyError, ToveError
from tove_llava.inference.replies import Request
from tove_llava.inference.rolling_batch import Batch, Room

T = TypeVar("T")

FULL = (torch.OutOfMemoryError, MemoryError)

log = logging.getLogger(__name__)


class Worker:
    """Answers requests with one batch, and runs other jobs between two tokens.

    When the device's memory is full, fewer answers run at a time: the others go back to the front of the queue with
    their tokens and go on later. An answer that does not fit by itself fails.

    Args:
        max_batch, max_waiting: answers at a time, and requests in the queue.
        forget: frees memory that the batch can do without.
    """

    def __init__(self, batch: Batch, max_batch: int, max_waiting: int, forget: Callable[[], None]) -> None:
        self._batch = batch
        self._room = Room(min(max_batch, batch.limit or max_batch))
        self._max_waiting = max_waiting
        self._forget = forget
        self._waiting: deque[Request] = deque()
        self._jobs: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    # -- for any thread ------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Return the number of requests in the queue."""
        with self._changed:
            return sum(request.live for request in self._waiting)

    @property
    def running(self) -> int:
        """Return the number of answers in the making."""
        return len(self._batch.live)

    def check_room(self) -> None:
        """Raise BusyError when no further request would be taken."""
        with self._changed:
            if self._closing:
                raise BusyError("the engine is shut down")
            self._waiting = deque(request for request in self._waiting if request.live)
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
        """Run ``job`` between two tokens and return its result.

        Raises:
            BusyError: too many jobs are waiting, or the worker is closed.
        """
        future: Future[object] = Future()
        with self._changed:
            if self._closing:
                raise BusyError("the engine is shut down")
            if len(self._jobs) >= self._max_waiting:
                raise BusyError(f"{self._max_waiting} requests are waiting already; try again in a moment")
            self._jobs.append((job, future))
            self._wake()
        return future.result()  # type: ignore[return-value]

    def position(self, request: Request) -> int:
        """Return a request's position in the queue from 1; 0 outside it."""
        with self._changed:
            ahead = [each for each in self._waiting if each.live or each is request]
            return ahead.index(request) + 1 if request in ahead else 0

    def cancel(self, request: Request) -> None:
        """End a request that nobody waits for any more."""
        request.cancelled = True
        request.events.put(None)  # for a reader in another thread
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)

    def close(self, patience: float) -> None:
        """Refuse new and waiting requests; running answers may end for ``patience`` seconds."""
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

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tove-llava engine", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    # -- for the worker's thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._advance():
            pass

    def _advance(self) -> bool:
        """Wait for work and do a step; return False after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._jobs or self._batch.rows or self._closing)
            if self._closing and not self._batch.live:
                self._refuse_waiting()  # requests that came back because the memory was full
                return False
            jobs, requests = list(self._jobs), []
            self._jobs.clear()
            free = self._room.size - len(self._batch.live)
            while self._waiting and len(requests) < free:
                request = self._waiting.popleft()
                if request.live:
                    requests.append(request)
        for job, future in jobs:
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)
        if requests:
            self._join(requests)
            self._room.grow(sum(row.ended for row in self._batch.rows))
        if self._batch.rows:
            failure = _failure(self._step)
            if isinstance(failure, FULL):
                self._make_room(self._batch.abandon(), 0)
            elif failure is not None:
                for request in self._batch.abandon():
                    request.finish(_explained(failure))
            self._room.grow(sum(row.ended for row in self._batch.rows))
        return True

    def _join(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.began = request.began or time.perf_counter()  # a second time after the memory was full
        failure = _failure(lambda: self._batch.join(requests))
        if isinstance(failure, FULL):
            self._make_room(requests, len(self._batch.live))
        elif failure is not None and len(requests) > 1:
            for request in requests:  # one by one, to find the one that fails
                self._join([request])
        elif failure is not None:
            requests[0].finish(_explained(failure))

    def _step(self) -> None:
        # Ended rows take no further step: they might exceed the positions that the model knows.
        self._batch.leave()
        self._batch.step()

    def _make_room(self, requests: Sequence[Request], running: int) -> None:
        """Requeue the requests that did not fit, or fail a single one."""
        self._forget()
        fits = self._room.halve(running + len(requests))
        if not requests:
            return
        if not fits:
            requests[0].finish(
                AnswerError(
                    "the device's memory is full with only this question; use fewer images, a shorter conversation or "
                    "a smaller --dtype"
                )
            )
            return
        with self._changed:
            self._waiting.extendleft(reversed(requests))
        log.warning("the device's memory is full; going on with %d answers at a time", self._room.size)


def _failure(work: Callable[[], object]) -> Exception | None:
    """Return the error of ``work`` without frames, which would hold tensors."""
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
    """Copy an error for one request, because threads raise it separately."""
    if isinstance(error, ToveError):
        return type(error)(*error.args)
    failed = AnswerError(f"the answer failed in the program ({type(error).__name__}: {error}); its log says where")
    failed.__cause__ = error
    return failed
