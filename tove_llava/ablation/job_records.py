"""Keep a job's state, ingredients and cost on disk."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import IO, Any

from tove_llava.ablation.grid import Job
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.files import read_json_object, write_atomically
from tove_llava.core.locks import hold
from tove_llava.core.sources import Source
from tove_llava.core.version import __version__
from tove_llava.doctor.machine import core_count

BEGUN, DONE, FAILED = "begun", "done", "failed"
_ENDS = 1 << 20  # bytes at a file's start and end that tell weights apart


class JobRecord:
    """The files of a job, ``OUT/jobs/NAME.*``."""

    def __init__(self, out: Path, job: Job) -> None:
        self.job = job
        base = out / "jobs" / job.name
        self.file, self.log = base.with_name(f"{job.name}.json"), base.with_name(f"{job.name}.log")
        self._lock = base.with_name(f"{job.name}.lock")

    def read(self) -> dict[str, Any]:
        """Return the record, empty before the first try.

        Raises:
            ConfigError: the job was made with other parts or another version.
        """
        if not self.file.is_file():
            return {}
        record = read_json_object(self.file, DataError, "delete it to run the job again")
        made = self.made()
        for key in made.keys() | record.get("made", {}).keys():
            old, new = record.get("made", {}).get(key), made.get(key)
            if old != new:
                raise ConfigError(
                    f"{self.file}: {key} was {old}, and is {new}. Give another --out, or delete this file and the "
                    "folder of its command to run the job again"
                )
        return record

    @property
    def is_done(self) -> bool:
        return self.read().get("state") == DONE

    def lock(self) -> IO[bytes] | None:
        """Lock the job; None where another process runs it."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        return hold(self._lock)

    def begin(self) -> None:
        tries = self.read().get("tries", 0) + 1
        self._write({"state": BEGUN, "tries": tries, "commit": commit(), "machine": machine(), "date": today()})

    def end(self, exit_code: int, seconds: float, cpu_seconds: float) -> None:
        """Record how a try ended; the times are this try's."""
        ended = {"exit_code": exit_code, "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
        self._write({**self.read(), "state": FAILED if exit_code else DONE, **ended})

    def _write(self, record: dict[str, Any]) -> None:
        first = {"title": self.job.title, "command": ["tove-llava", *self.job.words], "made": self.made()}
        write_atomically(self.file, json.dumps({**first, **record}, indent=1) + "\n")

    def made(self) -> dict[str, Any]:
        """Return what the result depends on, besides the job's key."""
        return {"version": __version__, **part_prints(self.job.sources)}


def part_prints(sources: Iterable[str]) -> dict[str, str]:
    """Map local sources to a digest of their files."""
    return {source: found for source in sorted(sources) if (found := _print_of(source)) is not None}


@cache
def _print_of(source: str) -> str | None:
    path = Source.parse(source).path
    if path is None or not path.exists():
        return None
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.suffix != ".md":
            found.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as handle:
                found.update(handle.read(_ENDS))
                handle.seek(max(0, file.stat().st_size - _ENDS))
                found.update(handle.read())
    return found.hexdigest()[:16]


@cache
def commit() -> str:
    """Return the commit of this package's repository (``+`` if its files differ), or ``unknown``."""
    root = Path(__file__).resolve().parents[2]
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"
        changed = _git(root, "status", "--porcelain", "--", "tove_llava")
        return _git(root, "rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


@cache
def machine() -> str:
    """Describe the processor, cores, and any GPUs."""
    import torch

    gpus = sorted({torch.cuda.get_device_properties(number).name for number in range(torch.cuda.device_count())})
    return ", ".join([_processor(), f"{core_count()} cores", *(f"GPU {name}" for name in gpus)])


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine or platform.machine()
