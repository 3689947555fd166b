"""Timing, memory and FLOPs of the benchmarks."""

import gc
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tove_llava.core.errors import ToveError

GB, MB = 1e9, 1e6
FEWEST = 2  # repeats that are made even after --limit


def reason_of(error: Exception) -> str:
    """Describe an error in one line; print a program fault's traceback."""
    text = next(iter(str(error).strip().splitlines()), "")
    if not isinstance(error, ToveError):
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text).replace("|", "/")


@dataclass
class Samples:
    """Wall-clock and processor seconds of one contender, by repeat."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)

    def to_dict(self) -> dict[str, Any]:
        return {"wall_seconds": spread(self.wall), "cpu_seconds": spread(self.cpu)}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median, the quartiles and all values."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "q1": low, "q3": high, "values": list(values)}


def measure(
    contenders: dict[str, Callable[[], Any]],
    *,
    repeats: int,
    warmup: int,
    device: torch.device,
    clocks: Mapping[str, Callable[[], float]] | None = None,
    prepare: Callable[[str], Any] = lambda name: None,
    lost: dict[str, str] | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> dict[str, Samples]:
    """Time every contender once per repeat; each repeat begins with another one.

    A slow phase of the machine then slows all of them, and ratios of contenders hold.

    Args:
        clocks: processor seconds so far, of contenders that work in a process of their own.
        prepare: called with a contender's name before its clock starts.
        lost: if given, gets the reason of a contender that fails, and the others go on.
        is_over: when this says so, no repeat beyond :data:`FEWEST` begins.
    """

    def run(name: str, times: int, samples: Samples | None = None) -> None:
        try:
            prepare(name)
            for _ in range(times):
                synchronize(device)
                clock = (clocks or {}).get(name, time.process_time)
                wall, cpu = time.perf_counter(), clock()
                contenders[name]()
                synchronize(device)
                if samples is not None:
                    samples.wall.append(time.perf_counter() - wall)
                    samples.cpu.append(clock() - cpu)
        except Exception as error:
            if lost is None:
                raise
            lost[name] = reason_of(error)
        if name in given:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    given = {} if lost is None else lost
    for name in contenders:
        run(name, warmup)
    names = list(contenders)
    samples = {name: Samples() for name in names}
    for repeat in range(repeats):
        if repeat >= FEWEST and is_over():
            break
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            if name not in given:
                run(name, 1, samples[name])
    return {name: found for name, found in samples.items() if name not in given}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(numerator: Samples, denominator: Samples) -> dict[str, float]:
    """Return ratios of medians, quartiles by repeat, and processor times.

    Processor time does not count waiting for a core, so on a shared CPU it is the steadier one; on a GPU it is the
    time that the host took to launch the work.
    """
    pairs = spread([a / b for a, b in zip(numerator.wall, denominator.wall, strict=True)])
    return {
        "value": numerator.median / denominator.median,
        "paired_q1": pairs["q1"],
        "paired_q3": pairs["q3"],
        "cpu_time": numerator.cpu_median / denominator.cpu_median,
    }


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """Return a matrix product that fills the device, and its FLOPs."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.matmul(a, b, out=out), 2.0 * side**3


def held_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that this process cannot give back."""
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 in float32: convolutions use TF32 by default, whose error is 1e-3."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Measure the most bytes of tensors that ``run`` adds.

    On a GPU by what the caching allocator reserves, as CUDA graphs' pools and fragments are of no use to others; on the
    CPU by torch's own record of allocations, which does not see the scratch memory of the kernels' libraries.
    """
    if device.type == "cuda":
        before = held_memory(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
        run()
    events = [e for e in recorder.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def count_flops(run: Callable[[], Any]) -> int:
    """Count the operations of matrix products, convolutions and attention.

    Two per multiply-add. Attention counts as its matrix products, because fused backward kernels recompute the scores.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
