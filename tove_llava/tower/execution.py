"""How a tower's frozen encoders are run: one after another, side by side, or side by side and compiled.

Side by side means, on a GPU, one stream each, all of it recorded once as a CUDA graph for each batch size and replayed;
on the CPU, where they are compiled, threads with an equal share of the cores each. An encoder that would leave threads
waiting for its end is run by all of them, each for its share of the images. What is not compiled runs one after another
there: each operation needs Python's lock, and threads that wait for it take longer than they gain.
Nothing here waits for the device or looks at a value.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from tove_llava.core.errors import ConfigError, ToveError

# What is more than so many is run eagerly.
MAX_SIZES = 8  # batch sizes that something is compiled or recorded for
MAX_GRAPHS = 16  # graphs: batch sizes, and sets of experts that are attached
MIN_SHARE = 4  # images of a thread: smaller batches are much less efficient
_SHARED = 1.05  # cost of an encoder whose images are shared out, over its cost for all at once: measured
_WARM_UP = 3  # runs before a graph is recorded: libraries choose kernels and allocate what they keep

T = TypeVar("T")
Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mode:
    """What an execution does."""

    concurrent: bool
    compiled: bool


EXECUTIONS = {
    "eager": Mode(concurrent=False, compiled=False),
    "concurrent": Mode(concurrent=True, compiled=False),
    "compiled": Mode(concurrent=True, compiled=True),
}


def execution_mode(name: str) -> Mode:
    """The mode of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in EXECUTIONS:
        raise ConfigError(f"unknown execution {name!r} of the tower; known: {', '.join(EXECUTIONS)}")
    return EXECUTIONS[name]


class Encoders(Protocol):
    """What is executed: CLIP and experts."""

    def networks(self, names: Sequence[str]) -> dict[str, object]:
        """CLIP and the named experts' networks, by name."""

    def functions(self, names: Sequence[str]) -> dict[str, Function]:
        """What :meth:`tasks` calls with an encoder's prepared pixels, by the same names; it can be compiled."""

    def tasks(
        self, pixel_values: torch.Tensor, names: Sequence[str], compiled: Mapping[str, Function]
    ) -> dict[str, partial[torch.Tensor]]:
        """One call for each encoder, its pixels prepared, with ``compiled`` in place of a function."""


class Execution:
    """Runs the encoders of one tower, and keeps what was compiled and recorded for them.

    What is kept belongs to weights at one place, in one dtype: :meth:`reset` forgets it. A copy has the same mode and
    makes its own. Calls of several threads are run one at a time.
    """

    def __init__(self, name: str = "eager") -> None:
        self.name, self.mode = name, execution_mode(name)
        self._lock = threading.Lock()
        self._workers: _Workers | None = None
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["name"])  # type: ignore[misc]

    def reset(self) -> None:
        """Forgets what was compiled and recorded; it is made again when it is needed."""
        self._networks: dict[str, object] = {}
        self._sizes: dict[Hashable, list[int]] = {}
        self._costs: dict[str, int] = {}
        self._compiled: dict[Hashable, Function] = {}
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool: Any = None  # memory that all graphs share

    def run(self, encoders: Encoders, pixel_values: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """What CLIP and each named expert make of the images, by name, without autograd and unchecked.

        Raises:
            ConfigError: an encoder cannot be compiled or recorded here.
        """
        if not self.mode.concurrent or torch.compiler.is_compiling() or len(pixel_values) == 0:
            return _one_after_another(encoders, pixel_values, names)
        # What is kept has to be usable under inference mode and outside it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if pixel_values.is_inference():
                pixel_values = pixel_values.clone()
            self._follow(encoders.networks(names))
            if pixel_values.is_cuda:
                with torch.cuda.device(pixel_values.device):
                    return self._on_gpu(encoders, pixel_values, names)
            if self.mode.compiled:
                return self._on_cpu(encoders, pixel_values, names)
            return _one_after_another(encoders, pixel_values, names)

    def _follow(self, networks: dict[str, object]) -> None:
        """Resets where a network was exchanged for another."""
        if any(self._networks.get(name, network) is not network for name, network in networks.items()):
            self.reset()
        self._networks |= networks

    # -- CPU ----------------------------------------------------------------------------------------------------------

    def _on_cpu(self, encoders: Encoders, pixel_values: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
        workers = self._start_workers(1 + len(names))
        where = _circumstances(pixel_values, workers.threads_each)
        batch, size = len(pixel_values), self._size(len(pixel_values), where)
        if size is None:
            return _one_after_another(encoders, pixel_values, names)
        pixels = _padded(pixel_values, size)
        costs = self._count(encoders, pixels, names)
        shared = to_share(costs, workers.count) if size >= MIN_SHARE * workers.count else []
        whole = sorted(set(costs) - set(shared), key=lambda name: (-costs[name], name))  # as to_share() counts on
        share = math.ceil(size / workers.count)
        parts = list(_padded(pixels, share * workers.count).split(share)) if shared else []
        compiled = self._compile(encoders, pixels, names, whole, workers)
        for_share = self._compile(encoders, parts[0], names, shared, workers) if shared else {}

        def prepare() -> list[Callable[[], dict[str, torch.Tensor]]]:
            tasks = encoders.tasks(pixels, [name for name in names if name in whole], compiled)
            return [partial(_run, {name: tasks[name]}) for name in whole]

        def encode(part: torch.Tensor) -> dict[str, torch.Tensor]:
            tasks = encoders.tasks(part, [name for name in names if name in shared], for_share)
            return _run({name: tasks[name] for name in shared})

        # The pixels are prepared on the workers too: the threads that help this one go on spinning for a while after
        # each operation, on the cores that the workers need.
        calls = workers.call(prepare)
        done = workers.run(calls + [partial(encode, part) for part in parts])
        made = {name: [some[name] for some in done if name in some] for name in costs}
        return {name: (torch.cat(some) if name in shared else some[0])[:batch] for name, some in made.items()}

    def _count(self, encoders: Encoders, pixel_values: torch.Tensor, names: Sequence[str]) -> dict[str, int]:
        """Operations of each encoder for an image, which do not depend on how long something took."""
        functions = encoders.functions(names)
        if not functions.keys() <= self._costs.keys():
            for name, task in encoders.tasks(pixel_values[:1], names, {}).items():
                with FlopCounterMode(display=False) as counter:
                    task()
                self._costs[name] = counter.get_total_flops()
        return {name: self._costs[name] for name in functions}

    def _start_workers(self, tasks: int) -> _Workers:
        threads = torch.get_num_threads()
        if self._workers is None or self._workers.made_for != (tasks, threads):
            if self._workers is not None:
                self._workers.stop()
            self._workers = _Workers(tasks, threads)
        return self._workers

    def _compile(
        self,
        encoders: Encoders,
        pixel_values: torch.Tensor,
        names: Sequence[str],
        wanted: Sequence[str],
        workers: _Workers | None,
    ) -> dict[str, Function]:
        """The wanted ones' compiled functions for pixels of this shape, made where they are missing, one by one."""
        where = _circumstances(pixel_values, workers.threads_each if workers else 0), len(pixel_values)
        functions = encoders.functions(names)
        missing = [name for name in wanted if (where, name) not in self._compiled]
        if missing:
            fresh = {name: _compiled(functions[name]) for name in missing}
            tasks, plain = encoders.tasks(pixel_values, names, fresh), encoders.tasks(pixel_values, names, {})
            for name in missing:
                plain[name]()  # transformers prepares some models when they first run, in ways that break up a graph
                with _explained(f"the tower's encoder {name!r} cannot be compiled here"):
                    # On a thread that will run it: what is compiled depends on a thread's number of cores.
                    make = partial(_frozen, tasks[name])
                    workers.call(make) if workers else tasks[name]()
                self._compiled[where, name] = fresh[name]
        return {name: self._compiled[where, name] for name in wanted}

    # -- GPU ----------------------------------------------------------------------------------------------------------

    def _on_gpu(self, encoders: Encoders, pixel_values: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
        where = _circumstances(pixel_values, 0)
        batch, size = len(pixel_values), self._size(len(pixel_values), where)
        key = (where, size, tuple(names))
        if size is None or (key not in self._graphs and len(self._graphs) == MAX_GRAPHS):
            return _one_after_another(encoders, pixel_values, names)
        if key not in self._graphs:
            pixels = _padded(pixel_values, size)
            every = list(encoders.functions(names))
            compiled = self._compile(encoders, pixels, names, every, None) if self.mode.compiled else {}
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with _explained("the tower's encoders cannot be recorded as a CUDA graph"):
                self._graphs[key] = _Graph(lambda x: encoders.tasks(x, names, compiled), pixels, self._pool)
        return self._graphs[key](pixel_values, batch)

    def _size(self, batch: int, where: Hashable) -> int | None:
        """The batch size to run for ``batch`` images: one that there is already, or a new one; None when too many."""
        made = self._sizes.setdefault(where, [])
        near = [size for size in made if batch <= size <= 2 * batch]
        if near:
            return min(near)
        if len(made) == MAX_SIZES:
            return None
        made.append(batch if not made else 1 << (batch - 1).bit_length())  # the first is most likely the usual one
        return made[-1]


class _Workers:
    """Threads that run one call at a time each, on their share of the cores.

    Args:
        tasks: how many encoders there are to run.
        threads: of torch's, to share.
    """

    def __init__(self, tasks: int, threads: int) -> None:
        self.made_for = (tasks, threads)
        self.count = min(tasks, threads)
        self.threads_each = threads // self.count
        started = threading.Barrier(self.count + 1)

        def start() -> None:
            torch.get_num_threads()  # gives this thread the number of all; what is set before that does not last
            torch.set_num_threads(self.threads_each)  # of this thread, and of all that begin later
            started.wait()

        self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="tove-encoder", initializer=start)
        for _ in range(self.count):
            self._threads.submit(int)
        started.wait()
        torch.set_num_threads(threads)

    def stop(self) -> None:
        self._threads.shutdown()

    def call(self, function: Callable[[], T]) -> T:
        """One call."""
        return self.run([function])[0]

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """All of them, those given first begun first; the first error is raised when all have ended."""
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def call(task: Callable[[], T]) -> T:
            with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=enabled):  # both belong to a thread
                return task()

        futures = [self._threads.submit(call, task) for task in tasks]
        wait(futures)
        return [future.result() for future in futures]


def to_share(costs: Mapping[str, float], threads: int) -> list[str]:
    """The encoders that all threads should run, each for its share of the images; the rest go to one thread each.

    It is the most expensive ones, as many as let the last thread end earliest, or none.

    Args:
        costs: by encoder.
    """
    order = sorted(costs, key=lambda name: -costs[name])

    def end(shared: int) -> float:
        loads = [0.0] * threads
        for cost in [costs[name] for name in order[shared:]]:  # as the threads take them: each when it is free
            loads[loads.index(min(loads))] += cost
        share = sum(costs[name] for name in order[:shared]) * _SHARED / threads
        for _ in range(threads):
            loads[loads.index(min(loads))] += share
        return max(loads)

    return order[: min(range(len(order) + 1), key=end)] if threads > 1 else []


class _Graph:
    """All encoders as one CUDA graph, each on a stream of its own.

    Args:
        tasks: pixels -> the calls to record.
        pixels: ``[B,3,S,S]`` on the current device, of the size that the graph is for.
        pool: memory pool shared with other graphs; what a replay leaves there lasts until the next one's.
    """

    def __init__(
        self,
        tasks: Callable[[torch.Tensor], dict[str, partial[torch.Tensor]]],
        pixels: torch.Tensor,
        pool: Any,
    ) -> None:
        self._pixels = pixels.clone()
        self._streams: dict[str, torch.cuda.Stream] = {}
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._side_by_side(tasks(self._pixels))
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (pinning memory, watching collectives) may go on talking to the device meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = self._side_by_side(tasks(self._pixels))

    def _side_by_side(self, tasks: dict[str, partial[torch.Tensor]]) -> dict[str, torch.Tensor]:
        here = torch.cuda.current_stream()
        outputs = {}
        for name, task in tasks.items():
            stream = self._streams[name] = self._streams.get(name) or torch.cuda.Stream()
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                outputs[name] = task()
            for value in (*task.args, *task.keywords.values()):
                if isinstance(value, torch.Tensor):
                    value.record_stream(stream)  # made on this stream, read on that one
        for name, stream in self._streams.items():
            here.wait_stream(stream)
            outputs[name].record_stream(here)
        return outputs

    def __call__(self, pixel_values: torch.Tensor, batch: int) -> dict[str, torch.Tensor]:
        self._pixels[:batch].copy_(pixel_values)
        if batch < len(self._pixels):
            self._pixels[batch:] = pixel_values[-1:]
        self._graph.replay()
        # Copies: a caller may keep them, for a backward pass too, and the next replay writes to the same place.
        return {name: out[:batch].clone() for name, out in self._outputs.items()}


def _run(tasks: Mapping[str, Callable[[], torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: task() for name, task in tasks.items()}


def _one_after_another(encoders: Encoders, pixel_values: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    return _run(encoders.tasks(pixel_values, names, {}))


def _circumstances(pixel_values: torch.Tensor, threads: int) -> Hashable:
    """What something compiled or recorded is for, beside the batch size."""
    kind = pixel_values.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return pixel_values.device, pixel_values.dtype, autocast, threads


def _padded(pixel_values: torch.Tensor, size: int) -> torch.Tensor:
    """``size`` images; the last one again for those that are not there."""
    missing = size - len(pixel_values)
    return torch.cat([pixel_values, pixel_values[-1:].expand(missing, -1, -1, -1)]) if missing else pixel_values


def _compiled(function: Function) -> Function:
    """Compiles at the first call, for that call's shape alone."""
    # Each with a cache of its own: experts share their class's code, and torch limits how often that is compiled.
    known = inspect.signature(torch.compile).parameters
    alone = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    return torch.compile(function, dynamic=False, **alone)  # type: ignore[call-overload,no-any-return]


def _frozen(task: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Runs a task for the first time on the CPU: weights become constants, laid out as the kernels want them, and all
    of it one call of C++, which lets go of Python's lock: other threads would wait for it else."""
    from torch._inductor import config

    with config.patch(freezing=True, cpp_wrapper=True):
        return task()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except ToveError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{what} ({reason}); use the execution 'eager'") from error
