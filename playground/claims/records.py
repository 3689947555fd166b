"""Records of a run's ingredients and costs, compared before results are reused."""

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BEGUN, DONE = "begun.json", "done.json"
PAGES = (
    "docs/background/claims.md",
    "docs/background/assets",
)  # files that the study itself writes: they do not change what is measured


class StaleRecord(RuntimeError):
    """A folder holds results of something other than what is asked for."""


def is_done(folder: Path, made: dict[str, Any]) -> bool:
    """Tell if a folder holds ``made``'s finished results; None is not compared.

    Raises:
        StaleRecord: it holds results, or a beginning, of something else.
    """
    for name in (DONE, BEGUN):
        if (folder / name).is_file():
            recorded = json.loads((folder / name).read_text()).get("made")
            if recorded is None:
                break
            if different := _differences(recorded, made):
                raise StaleRecord(f"{folder} was made of something else: {'; '.join(different)}. {_ADVICE}")
            return name == DONE
    if folder.is_dir() and any(folder.iterdir()):
        raise StaleRecord(f"{folder} does not say what it was made of. {_ADVICE}")
    return False


_ADVICE = "Delete this folder to make it again, or choose another --out"


def _differences(recorded: dict[str, Any], made: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(recorded.keys() | made.keys()):
        old, new = recorded.get(key), made.get(key)
        if key in made and new is None:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r}, is {new!r}")
    return found


@contextmanager
def recorded(folder: Path, made: dict[str, Any], commit: str) -> Iterator[None]:
    """Write ``begun.json``, run the block, and write ``done.json`` with its cost."""
    from tove_llava.core.files import write_atomically

    resumed = (folder / BEGUN).is_file()
    write_atomically(folder / BEGUN, json.dumps({"made": made}, indent=1) + "\n")
    began, spent = time.monotonic(), processor_seconds()
    yield
    record = {
        "made": made,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(processor_seconds() - spent, 1),
        "resumed": resumed,  # then the seconds are only those of the last attempt
        "date": today(),
        "commit": commit,
        "machine": machine(),
    }
    write_atomically(folder / DONE, json.dumps(record, indent=1) + "\n")


def processor_seconds() -> float:
    """Sum the processor seconds of this process and its ended children."""
    return sum(os.times()[:4])


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def parts(preset: dict[str, Any]) -> dict[str, str]:
    """Map a preset's bundled parts to a hash of their files."""
    return {source: _hash_of(source.partition(":")[2]) for source in sorted(_bundled(preset))}


def _bundled(value: Any) -> set[str]:
    if isinstance(value, str):
        return {value} if value.startswith("bundled:") else set()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return set().union(*map(_bundled, inner))


@cache
def _hash_of(name: str) -> str:
    found = hashlib.sha256()
    for file in sorted((ROOT / "tove_llava" / "bundled" / name).iterdir()):
        if file.suffix != ".md":
            found.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:16]


def weights(model: Path) -> str | None:
    """Fingerprint a model's trained weights; None while there is no model."""
    from tove_llava.checkpoints.manifest import MANIFEST, Manifest

    return Manifest.read(model).fingerprint if (model / MANIFEST).is_file() else None


def commit() -> str:
    """Return the commit (``+`` if files differ); ``unknown`` outside the repository."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"
        changed = _git("status", "--porcelain", "--", ".", *(f":!{page}" for page in PAGES))
        return _git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


@cache
def machine() -> str:
    """Describe the processor, cores, and any GPUs."""
    import torch

    from tove_llava.doctor.machine import core_count

    gpus = sorted({torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())})
    return ", ".join([_processor(), f"{core_count()} cores", *(f"GPU {name}" for name in gpus)])


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


@dataclass(frozen=True)
class Cost:
    """The cost of some runs and measurements, from their ``done.json``."""

    records: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, folders: Iterator[Path] | list[Path]) -> "Cost":
        return cls(tuple(json.loads((folder / DONE).read_text()) for folder in folders))

    @property
    def cpu_seconds(self) -> float:
        return sum(record["cpu_seconds"] for record in self.records)

    def distinct(self, key: str) -> list[str]:
        return sorted({record[key] for record in self.records})

    @property
    def resumed(self) -> int:
        return sum(record["resumed"] for record in self.records)
