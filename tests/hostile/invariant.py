"""The invariant of hostile inputs, for commands that run in this process.

A command gives the right result with exit code 0; or it names what is wrong with exit code 2, and leaves nothing
behind. Either way it starts no process, runs nothing of a file, writes nowhere else, and needs less than 1 GB and a few
seconds.
"""

import io
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 30
MEMORY = 10**9
PROCESSES = (
    "subprocess.Popen",
    "os.fork",
    "os.forkpty",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
)
NETWORK = ("socket.connect", "socket.getaddrinfo")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass
class Case:
    """One hostile input.

    Attributes:
        call: returns an exit code; ``cli.main`` with words, usually.
        names: an error has to name one of these.
        right: checks the result of exit code 0, given standard output.
        passes: the input is harmless, so that an error is wrong.
        keeps: a folder whose results so far may stay after an error.
        folder: holds the input; whatever is new there after an error is left behind.
        what: the input, for messages.
    """

    call: Callable[[], int]
    names: tuple[str, ...]
    right: Callable[[str], None]
    folder: Path
    what: str = ""
    passes: bool = False
    keeps: str = ""


class Watch:
    """Notes forbidden acts of this process, by an audit hook that stays."""

    _watching: "Watch | None" = None
    _hooked = False

    def __init__(self, folder: Path) -> None:
        self.folder, self.acts = os.path.realpath(folder), []

    def __enter__(self) -> "Watch":
        if not Watch._hooked:
            sys.addaudithook(Watch._hook)
            Watch._hooked = True
        Watch._watching = self
        return self

    def __exit__(self, *_: object) -> None:
        Watch._watching = None

    @staticmethod
    def _hook(event: str, args: tuple) -> None:
        watch = Watch._watching
        if watch is None:
            return
        if event in PROCESSES or event in NETWORK or event == "pickle.find_class":
            watch.acts.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], str | bytes) and (args[2] or 0) & _WRITING:
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith((watch.folder, "/dev/", "/proc/")) and "__pycache__" not in path:
                watch.acts.append(f"wrote {path}")
        elif event == "exec" and getattr(args[0], "co_filename", "").startswith(watch.folder):
            watch.acts.append(f"ran {args[0].co_filename}")


class Hang(Exception):
    """The command took too long."""


@contextmanager
def time_limit(seconds: int):
    def late(*_):
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns) if path.is_file() else (0, 0)
    return found


def resident(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


@dataclass
class Outcome:
    """The end of one command."""

    code: int = 0
    out: str = ""
    err: str = ""
    faults: list[str] = field(default_factory=list)


def attempt(case: Case) -> Outcome:
    """Run a case; ``faults`` says how it broke the invariant."""
    outcome, out, err = Outcome(), io.StringIO(), io.StringIO()
    before = contents(case.folder)
    forget_peak()
    held = resident("VmRSS")
    with Watch(case.folder) as watch:
        try:
            with redirect_stdout(out), redirect_stderr(err), time_limit(SECONDS):
                outcome.code = case.call()
        except SystemExit as end:
            outcome.code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:
            outcome.code = -1
            last = traceback.extract_tb(error.__traceback__)[-1]
            outcome.faults.append(f"{type(error).__name__}: {error!s:.300} (at {last.filename}:{last.lineno})")
    grown = resident("VmHWM") - held
    outcome.out, outcome.err = out.getvalue(), err.getvalue()
    text = outcome.out + outcome.err
    outcome.faults += watch.acts
    if "Traceback" in text:
        outcome.faults.append("a traceback is shown")
    if grown > MEMORY:
        outcome.faults.append(f"{grown / 1e9:.1f} GB of memory")
    if outcome.code == 2:
        if not any(name in text for name in case.names):
            outcome.faults.append(f"the message names none of {case.names}")
        left = [name for name, _ in contents(case.folder).items() ^ before.items()]
        if left := [name for name in left if not case.keeps or name.partition("/")[0] != case.keeps]:
            outcome.faults.append(f"left behind: {sorted(left)[:3]}")
        if case.passes:
            outcome.faults.append("harmless, and refused")
    elif outcome.code == 0:
        try:
            case.right(outcome.out)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            outcome.faults.append(f"a wrong result: {type(error).__name__}: {error!s:.300} (line {last.lineno})")
    elif outcome.code != -1:
        outcome.faults.append(f"exit code {outcome.code}")
    return outcome


def describe(case: Case, outcome: Outcome) -> str:
    """Tell a broken invariant so that it can be repeated."""
    said = (outcome.err or outcome.out).strip()[-400:]
    return f"{case.what}: {'; '.join(outcome.faults)}\n  said: {said!r}\n  input: {case.folder}"


def strict_json(text: str) -> object:
    """Read JSON that holds no NaN or infinity."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def finite(value: object) -> bool:
    """Tell if all numbers of a JSON value are finite."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)
