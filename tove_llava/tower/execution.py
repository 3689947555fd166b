"""Run a tower's frozen encoders in turn, concurrently, or concurrently and compiled.

On a GPU each encoder runs on its own stream. One CUDA graph of all encoders is recorded for each batch size and
replayed. On the CPU each compiled encoder runs in its own thread; the cores are divided equally. An encoder that would
leave threads idle is split by images instead. Encoders that are not compiled run in turn there: each operation needs
Python's lock, and waiting for it costs more than threads gain. Nothing here waits for the device or reads a value.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tove_llava.core.errors import ConfigError, ToveError
from tove_llava.tower.encoder_threads import EncoderThreads, to_share

# Beyond these limits encoders run eagerly.
MAX_SIZES = 8  # batch sizes that something is compiled or recorded for
MAX_GRAPHS = 16  # graphs, one for each batch size and set of attached experts
MIN_SHARE = 4  # least images of a thread: smaller batches are much less efficient
_WARM_UP = 3  # runs before a graph is recorded: libraries choose kernels and allocate memory

_NUMBERS = itertools.count()

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Mode:
    """The properties of an execution."""

    concurrent: bool
    compiled: bool


EXECUTIONS = {
    "eager": Mode(concurrent=False, compiled=False),
    "concurrent": Mode(concurrent=True, compiled=False),
    "compiled": Mode(concurrent=True, compiled=True),
}


def execution_mode(name: str) -> Mode:
    """Return the mode of a name, or raise ConfigError."""
    if name not in EXECUTIONS:
        raise ConfigError(f"unknown execution {name!r} of the tower; known: {', '.join(EXECUTIONS)}")
    return EXECUTIONS[name]


class Encoders(Protocol):
    """The encoders to execute: CLIP and experts."""

    def networks(self, names: Sequence[str]) -> dict[str, object]:
        """Return the networks of CLIP and the named experts."""

    def functions(self, names: Sequence[str]) -> dict[str, Function]:
        """Return the functions, to compile or not, that :meth:`tasks` calls."""

    def tasks(
        self, pixel_values: Tensor, names: Sequence[str], compiled: Mapping[str, Function]
    ) -> dict[str, partial[Tensor]]:
        """Bind each encoder, or its ``compiled`` function, to its prepared pixels."""


class Execution:
    """Runs one tower's encoders; keeps their compiled functions and recorded graphs.

    These fit weights on one device and in one dtype; :meth:`reset` drops them. A copy has the same mode and makes its
    own. Calls from several threads run one at a time.
    """

    def __init__(self, name: str = "eager") -> None:
        self.name, self.mode = name, execution_mode(name)
        self._lock = threading.Lock()
        self._workers: EncoderThreads | None = None
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["name"])  # type: ignore[misc]

    def reset(self) -> None:
        """Drop compiled functions and graphs; the next run makes new ones."""
        self._networks: dict[str, object] = {}
        self._sizes: dict[Hashable, list[int]] = {}
        self._costs: dict[str, int] = {}
        self._compiled: dict[Hashable, Function] = {}
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool: Any = None  # memory that all graphs share

    def run(self, encoders: Encoders, pixel_values: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Encode images with CLIP and each named expert, without autograd and unchecked.

        Raises:
            ConfigError: an encoder cannot be compiled or recorded here.
        """
        if not self.mode.concurrent or torch.compiler.is_compiling() or len(pixel_values) == 0:
            return _run(encoders.tasks(pixel_values, names, {}))
        # Recorded outputs have to be usable in inference mode and outside it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if pixel_values.is_inference():
                pixel_values = pixel_values.clone()
            self._follow(encoders.networks(names))
            if pixel_values.is_cuda:
                with torch.cuda.device(pixel_values.device):
                    return self._on_gpu(encoders, pixel_values, names)
            if self.mode.compiled:
                return self._on_cpu(encoders, pixel_values, names)
            return _run(encoders.tasks(pixel_values, names, {}))

    def _follow(self, networks: dict[str, object]) -> None:
        """Reset if a network was replaced by another."""
        if any(self._networks.get(name, network) is not network for name, network in networks.items()):
            self.reset()
        self._networks |= networks

    # -- CPU ----------------------------------------------------------------------------------------------------------

    def _on_cpu(self, encoders: Encoders, pixel_values: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        workers = self._start_workers(1 + len(names))
        where = _circumstances(pixel_values, workers.threads_each)
        batch, size = len(pixel_values), self._size(len(pixel_values), where)
        if size is None:
            return _run(encoders.tasks(pixel_values, names, {}))
        pixels = _padded(pixel_values, size)
        costs = self._count(encoders, pixels, names)
        shared = to_share(costs, workers.count) if size >= MIN_SHARE * workers.count else []
        # The order that to_share() assumes.
        whole = sorted(set(costs) - set(shared), key=lambda name: (-costs[name], name))
        share = math.ceil(size / workers.count)
        parts = list(_padded(pixels, share * workers.count).split(share)) if shared else []
        compiled = self._compile(encoders, pixels, names, whole, workers)
        for_share = self._compile(encoders, parts[0], names, shared, workers) if shared else {}

        def prepare() -> list[Callable[[], dict[str, Tensor]]]:
            tasks = encoders.tasks(pixels, [name for name in names if name in whole], compiled)
            return [partial(_run, {name: tasks[name]}) for name in whole]

        def encode(part: Tensor) -> dict[str, Tensor]:
            tasks = encoders.tasks(part, [name for name in names if name in shared], for_share)
            return _run({name: tasks[name] for name in shared})

        # The workers prepare the pixels too: this thread's OpenMP helpers would go on spinning on the workers' cores.
        calls = workers.call(prepare)
        done = workers.run(calls + [partial(encode, part) for part in parts])
        made = {name: [some[name] for some in done if name in some] for name in costs}
        return {name: (torch.cat(some) if name in shared else some[0])[:batch] for name, some in made.items()}

    def _count(self, encoders: Encoders, pixel_values: Tensor, names: Sequence[str]) -> dict[str, int]:
        """Count each encoder's operations per image, equal in every run."""
        functions = encoders.functions(names)
        if not functions.keys() <= self._costs.keys():
            for name, task in encoders.tasks(pixel_values[:1], names, {}).items():
                with FlopCounterMode(display=False) as counter:
                    task()
                self._costs[name] = counter.get_total_flops()
        return {name: self._costs[name] for name in functions}

    def _start_workers(self, tasks: int) -> EncoderThreads:
        threads = torch.get_num_threads()
        if self._workers is None or self._workers.made_for != (tasks, threads):
            if self._workers is not None:
                self._workers.stop()
            self._workers = EncoderThreads(tasks, threads)
        return self._workers

    def _compile(
        self,
        encoders: Encoders,
        pixel_values: Tensor,
        names: Sequence[str],
        wanted: Sequence[str],
        workers: EncoderThreads | None,
    ) -> dict[str, Function]:
        """Return the wanted functions, compiled in turn for these pixels' shape."""
        where = _circumstances(pixel_values, workers.threads_each if workers else 0), len(pixel_values)
        functions = encoders.functions(names)
        missing = [name for name in wanted if (where, name) not in self._compiled]
        if missing:
            fresh = {name: _compiled(functions[name]) for name in missing}
            tasks, plain = encoders.tasks(pixel_values, names, fresh), encoders.tasks(pixel_values, names, {})
            for name in missing:
                plain[name]()  # transformers prepares some models in their first run, in ways that break up a graph
                with _explained(f"the tower's encoder {name!r} cannot be compiled here"):
                    # On a thread that will run it: the compiled code depends on the thread's number of cores.
                    make = partial(_frozen, tasks[name])
                    workers.call(make) if workers else tasks[name]()
                self._compiled[where, name] = fresh[name]
        return {name: self._compiled[where, name] for name in wanted}

    # -- GPU ----------------------------------------------------------------------------------------------------------

    def _on_gpu(self, encoders: Encoders, pixel_values: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        where = _circumstances(pixel_values, 0)
        batch, size = len(pixel_values), self._size(len(pixel_values), where)
        key = (where, size, tuple(names))
        if size is None or (key not in self._graphs and len(self._graphs) == MAX_GRAPHS):
            return _run(encoders.tasks(pixel_values, names, {}))
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
        """Choose an existing or new batch size; None beyond the limit."""
        made = self._sizes.setdefault(where, [])
        near = [size for size in made if batch <= size <= 2 * batch]
        if near:
            return min(near)
        if len(made) == MAX_SIZES:
            return None
        made.append(batch if not made else 1 << (batch - 1).bit_length())  # the first is probably the usual one
        return made[-1]


class _Graph:
    """All encoders as one CUDA graph, each on its own stream.

    Args:
        tasks: pixels -> the calls to record.
        pixels: ``[B,3,S,S]`` on the current device, of the graph's size.
        pool: memory pool shared with other graphs, whose replays overwrite it.
    """

    def __init__(self, tasks: Callable[[Tensor], dict[str, partial[Tensor]]], pixels: Tensor, pool: Any) -> None:
        self._pixels = pixels.clone()
        self._streams: dict[str, torch.cuda.Stream] = {}
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._side_by_side(tasks(self._pixels))
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Meanwhile other threads (pinning memory, watching collectives) may use the device.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = self._side_by_side(tasks(self._pixels))

    def _side_by_side(self, tasks: dict[str, partial[Tensor]]) -> dict[str, Tensor]:
        here = torch.cuda.current_stream()
        outputs = {}
        for name, task in tasks.items():
            stream = self._streams[name] = self._streams.get(name) or torch.cuda.Stream()
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                outputs[name] = task()
            for value in (*task.args, *task.keywords.values()):
                if isinstance(value, Tensor):
                    value.record_stream(stream)  # made on this stream, read on that one
        for name, stream in self._streams.items():
            here.wait_stream(stream)
            outputs[name].record_stream(here)
        return outputs

    def __call__(self, pixel_values: Tensor, batch: int) -> dict[str, Tensor]:
        self._pixels[:batch].copy_(pixel_values)
        if batch < len(self._pixels):
            self._pixels[batch:] = pixel_values[-1:]
        self._graph.replay()
        # Copies, because the next replay overwrites the originals: a caller may keep them, or need them backward.
        return {name: out[:batch].clone() for name, out in self._outputs.items()}


def _run(tasks: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
    return {name: task() for name, task in tasks.items()}


def _circumstances(pixel_values: Tensor, threads: int) -> Hashable:
    """Key compiled functions and graphs, in addition to the batch size."""
    kind = pixel_values.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return pixel_values.device, pixel_values.dtype, autocast, threads


def _padded(pixel_values: Tensor, size: int) -> Tensor:
    """Repeat the last image until there are ``size``."""
    missing = size - len(pixel_values)
    return torch.cat([pixel_values, pixel_values[-1:].expand(missing, -1, -1, -1)]) if missing else pixel_values


def _compiled(function: Function) -> Function:
    """Compile at the first call, for the shape of that call."""

    # Code of its own for each: experts share their class's, and torch runs code eagerly that it compiled too often.
    def encode(x: Tensor) -> Tensor:
        return function(x)

    encode.__code__ = encode.__code__.replace(co_name=f"encode_{next(_NUMBERS)}")
    return torch.compile(encode, dynamic=False)


def _frozen(task: Callable[[], Tensor]) -> Tensor:
    """Run a task for the first time on the CPU.

    The weights become constants in the kernels' layout. The whole task becomes one C++ call, which releases Python's
    lock.
    """
    from torch._inductor import config

    with config.patch(freezing=True, cpp_wrapper=True):
        return task()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (ToveError, torch.OutOfMemoryError):  # the caller may choose a smaller batch
        raise
    except Exception as error:
        if (cause := _out_of_memory(error)) is not None:
            raise cause from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{what} ({reason}); use the execution 'eager'") from error


def _out_of_memory(error: BaseException | None) -> BaseException | None:
    """Find the lack of memory that a compiler wrapped in an error of its own."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error
