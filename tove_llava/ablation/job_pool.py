"""Run jobs in processes, each with its share of the machine."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tove_llava.ablation.grid import Grid, Job
from tove_llava.ablation.job_processes import Main, fork_job, import_what_jobs_need, spawn_job
from tove_llava.ablation.job_records import JobRecord
from tove_llava.doctor.machine import core_count

_POLL = 0.2  # seconds
_GRACE = 600.0  # seconds that a stopped job may take to save its checkpoint

Say = Callable[[str], None]


def gpu_ids() -> list[str]:
    """List the GPUs as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


@dataclass
class _Child:
    record: JobRecord
    pid: int
    slot: int
    began: float


@dataclass
class JobPool:
    """Processes for the jobs of a grid.

    A job's process holds its lock, also after the death of this one. So no job runs twice at a time, and several
    commands can work on one grid.

    Args:
        size: jobs at a time.
        main: runs a command of this package; returns its exit code.
        gpus: from :func:`gpu_ids`; a job gets as many of them as the grid's trainings need.
    """

    grid: Grid
    size: int
    main: Main
    gpus: Sequence[str] = ()
    say: Say = print
    failures: dict[str, str] = field(default_factory=dict)  # key -> why

    def __post_init__(self) -> None:
        self._records = {
            key: JobRecord(self.grid.out, job) for key, job in self.grid.jobs.items() if key in self.grid.wanted
        }
        self._done = {key for key, record in self._records.items() if record.is_done}
        self._running: dict[str, _Child] = {}
        self._began, self._ended = time.monotonic(), 0

    def run(self) -> None:
        """Run all jobs that are not done; ``failures`` gets the others."""
        total = len(self._records)
        self.say(f"{total} jobs, {len(self._done)} of them done before; {self.size} at a time")
        told = False
        if not self.gpus:
            import_what_jobs_need()
        with _stopping_on_sigterm():
            try:
                while len(self._done) + len(self.failures) < total:
                    elsewhere = self._start_some()
                    if elsewhere and not self._running and not told:
                        self.say(f"waiting for jobs that another process runs: {', '.join(elsewhere)}")
                        told = True
                    time.sleep(_POLL)
                    self._collect()
            finally:
                self._stop()

    def _start_some(self) -> list[str]:
        """Start jobs while there is room; return those that run elsewhere."""
        elsewhere = []
        for job in self.grid.wanted_jobs:
            key = job.key
            if key in self._done or key in self._running or key in self.failures:
                continue
            lost = [need for need in job.needs if need in self.failures]
            if lost:
                self.failures[key] = f"not run, because it needs '{self.grid.jobs[lost[0]].title}'"
            elif len(self._running) < self.size and all(need in self._done for need in job.needs):
                lock = self._records[key].lock()
                if lock is None:
                    elsewhere.append(job.title)
                    continue
                with lock:
                    if self._records[key].is_done:
                        self._done.add(key)
                    else:
                        self._start(job, lock)
        return elsewhere

    def _start(self, job: Job, lock: Any) -> None:
        record = self._records[job.key]
        slot = next(slot for slot in range(self.size) if slot not in {child.slot for child in self._running.values()})
        record.begin()
        environment = self._environment(slot)
        with record.log.open("ab") as log:
            if self.gpus:
                pid = spawn_job(job.words, environment, log.fileno(), lock.fileno())
            else:
                pid = fork_job(self.main, job.words, environment, log.fileno())
        self._running[job.key] = _Child(record, pid, slot, time.monotonic())

    def _environment(self, slot: int) -> dict[str, str]:
        threads = str(max(1, core_count() // self.size))
        share = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        if self.gpus:
            first = slot * self.grid.gpus
            share["CUDA_VISIBLE_DEVICES"] = ",".join(
                self.gpus[number % len(self.gpus)] for number in range(first, first + self.grid.gpus)
            )
        return {**os.environ, **share}

    def _collect(self) -> None:
        """Record the jobs that have ended."""
        for key, child in list(self._running.items()):
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            code = os.waitstatus_to_exitcode(status)
            seconds = time.monotonic() - child.began
            child.record.end(code, seconds, usage.ru_utime + usage.ru_stime)
            del self._running[key]
            self._ended += 1
            if code == 0:
                self._done.add(key)
                self._tell(f"{child.record.job.title}: done in {seconds:.0f} s")
            else:
                self.failures[key] = f"exit code {code}, see {child.record.log}"
                self._tell(f"{child.record.job.title}: failed with exit code {code}, see {child.record.log}")

    def _tell(self, text: str) -> None:
        left = len(self._records) - len(self._done) - len(self.failures)
        minutes = left * (time.monotonic() - self._began) / self._ended / 60
        failed = f", {len(self.failures)} failed" if self.failures else ""
        self.say(f"[{len(self._done)}/{len(self._records)}] {text}{failed}; about {minutes:.0f} min left")

    def _stop(self) -> None:
        """Stop the jobs that run; the trainer saves a checkpoint first."""
        if not self._running:
            return
        self.say(f"stopping {len(self._running)} jobs; the same command goes on with them")
        for child in self._running.values():
            os.killpg(child.pid, signal.SIGTERM)
        end = time.monotonic() + _GRACE
        left = [child.pid for child in self._running.values()]
        while left and time.monotonic() < end:
            left = [pid for pid in left if os.waitpid(pid, os.WNOHANG)[0] == 0]
            time.sleep(_POLL)
        for pid in left:
            os.killpg(pid, signal.SIGKILL)


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit(143), so that running jobs are stopped too."""

    def stop(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
