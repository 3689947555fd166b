"""Threads that run a tower's encoders on the CPU, each on its share of the cores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

_SHARED = 1.05  # measured cost of an encoder that is split by images, over its cost for all at once

T = TypeVar("T")


class EncoderThreads:
    """Threads that run one call at a time each, on their share of the cores.

    Args:
        tasks: number of encoders.
        threads: torch's threads, to share.
    """

    def __init__(self, tasks: int, threads: int) -> None:
        self.made_for = (tasks, threads)
        self.count = min(tasks, threads)
        self.threads_each = threads // self.count
        started = threading.Barrier(self.count + 1)

        def start() -> None:
            torch.get_num_threads()  # initialises this thread's number, which would undo an earlier setting
            torch.set_num_threads(self.threads_each)  # of this thread, and of all that start later
            started.wait()

        self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="tove-encoder", initializer=start)
        for _ in range(self.count):
            self._threads.submit(int)
        started.wait()
        torch.set_num_threads(threads)

    def stop(self) -> None:
        self._threads.shutdown()

    def call(self, function: Callable[[], T]) -> T:
        return self.run([function])[0]

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run tasks, started in order; the first error is raised when all have ended."""
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def call(task: Callable[[], T]) -> T:
            with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=enabled):  # both belong to a thread
                return task()

        futures = [self._threads.submit(call, task) for task in tasks]
        wait(futures)
        return [future.result() for future in futures]


def to_share(costs: Mapping[str, float], threads: int) -> list[str]:
    """Choose the encoders to split by images over all threads; the others run in one thread each.

    Of the encoders by cost, the most expensive are split, in the number with which the last thread ends earliest.
    """
    order = sorted(costs, key=lambda name: -costs[name])

    def end(shared: int) -> float:
        loads = [0.0] * threads
        for cost in [costs[name] for name in order[shared:]]:  # each thread takes the next when it is free
            loads[loads.index(min(loads))] += cost
        share = sum(costs[name] for name in order[:shared]) * _SHARED / threads
        for _ in range(threads):
            loads[loads.index(min(loads))] += share
        return max(loads)

    return order[: min(range(len(order) + 1), key=end)] if threads > 1 else []
