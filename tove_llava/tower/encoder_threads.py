"""Threads that run a tower's encoders on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

_SHARED = 1.05  # measured: cost of an encoder that is split by images / its cost in one piece

T = TypeVar("T")


class EncoderThreads:
    """Threads with equal shares of the cores, each running one task.

    Args:
        tasks: number of encoders.
        threads: torch's number of threads, to share.
    """

    def __init__(self, tasks: int, threads: int) -> None:
        self.made_for = (tasks, threads)
        self.count = min(tasks, threads)
        self.threads_each = threads // self.count
        started = threading.Barrier(self.count + 1)

        def start() -> None:
            torch.get_num_threads()  # sets this thread's number once, which would later undo a setting
            torch.set_num_threads(self.threads_each)  # for this thread and all that start later
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
        """Run tasks in order; raise the first error when all have ended."""
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def call(task: Callable[[], T]) -> T:
            with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=enabled):  # both are settings of a thread
                return task()

        futures = [self._threads.submit(call, task) for task in tasks]
        wait(futures)
        return [future.result() for future in futures]


def to_share(costs: Mapping[str, float], threads: int) -> list[str]:
    """Choose the encoders to split by images over all threads.

    Split the most expensive, as many as let the last thread end earliest; the others run in one thread each.
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
