"""Map a function over processes."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_task: Callable[[Any], Any] | None = None


def _start(task: Callable[[Any], Any]) -> None:
    global _task
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    _task = task


def _work(item: Any) -> Any:
    assert _task is not None
    return _task(item)


def parallel_map(task: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """Map a picklable task over items, in order, with ``workers`` processes."""
    if workers == 1 or len(items) < 2:
        yield from map(task, items)
        return
    # Forked workers need not import torch and transformers, which takes longer than checking most data sets.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else None)
    with context.Pool(min(workers, len(items)), initializer=_start, initargs=(task,)) as pool:
        yield from pool.imap(_work, items, chunksize=max(1, min(256, len(items) // (4 * workers))))
