"""Start the ranks of a run, pass signals on to them, and wait until they have ended.

On one machine this module starts them itself, with the environment variables of torchrun. DeepSpeed's launcher and
torchrun do not wait for ranks that save a checkpoint, and print a traceback after an error that the ranks explained.
"""

import base64
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tove_llava.core.errors import ConfigError
from tove_llava.core.registry import closest

RANK = ["-m", "tove_llava", "train"]
INSTALL = {"deepspeed": "pip install 'tove-llava[train]'", "torchrun": "pip install torch"}
GRACE = 20.0  # seconds in which ranks may end by themselves after one of them failed


@dataclass(frozen=True)
class Launch:
    """The ranks of each node, and the launcher that starts them."""

    processes: int
    launcher: str | None = None  # deepspeed or torchrun; None: this module, or DeepSpeed for several nodes
    hostfile: str | None = None
    port: int | None = None
    environment: dict[str, str] | None = None

    def __post_init__(self) -> None:
        launcher = "deepspeed" if self.hostfile and self.launcher is None else self.launcher
        object.__setattr__(self, "launcher", launcher)
        if launcher is None:
            return
        if launcher not in INSTALL:
            raise ConfigError(f"unknown launcher {launcher!r}; use deepspeed or torchrun.{closest(launcher, INSTALL)}")
        if self.hostfile and launcher != "deepspeed":
            raise ConfigError("a hostfile is read by DeepSpeed's launcher; give --launcher deepspeed, or no --launcher")
        if self.hostfile and not os.path.isfile(self.hostfile):
            raise ConfigError(f"--hostfile {self.hostfile}: no such file")
        if find_spec("deepspeed" if launcher == "deepspeed" else "torch") is None:
            raise ConfigError(
                f"{launcher} is not installed; install it ({INSTALL[launcher]}), or leave out --launcher. "
                "Training without DeepSpeed: --deepspeed none"
            )

    def __str__(self) -> str:
        words = ["1 process" if self.processes == 1 else f"{self.processes} processes"]
        words.append("on the CPU" if self.environment else "with a GPU each")
        words += ["on each node of", self.hostfile] if self.hostfile else []
        words += ["by", self.launcher] if self.launcher else []
        return " ".join(words)

    def commands(self, arguments: Sequence[str]) -> list[tuple[list[str], dict[str, str]]]:
        """Return the command and the environment of each process to start."""
        inherited = {**os.environ, **(self.environment or {})}
        port = str(self.port or _free_port())
        if self.launcher is None:
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(self.processes)}
            shared |= {"LOCAL_WORLD_SIZE": str(self.processes)}
            command = [sys.executable, "-u", *RANK, *arguments]
            return [
                (command, {**inherited, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                for rank in range(self.processes)
            ]
        if self.launcher == "torchrun":
            command = ["-m", "tove_llava.train.torchrun", "--standalone", f"--nproc_per_node={self.processes}"]
        elif self.hostfile:
            command = ["-m", "deepspeed.launcher.runner", "--log_level=critical", "--hostfile", self.hostfile]
            command += ["--num_gpus", str(self.processes), "--no_local_rank", "--module"]
            command[3:3] = ["--master_port", port] if self.port else []
        else:  # what DeepSpeed's runner starts on one node; the runner itself does not pass signals on
            devices = visible_gpus() or [str(rank) for rank in range(self.processes)]
            world = json.dumps({"localhost": devices[: self.processes]})
            command = ["-m", "deepspeed.launcher.launch", "--log_level=critical", "--no_local_rank", "--module"]
            command += [f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}"]
            command += ["--master_addr=127.0.0.1", f"--master_port={port}"]
        rank = RANK if self.launcher == "torchrun" else RANK[1:]
        return [([sys.executable, *command, *rank, *arguments], inherited)]


def visible_gpus() -> list[str]:
    """List the GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [word for word in visible.split(",") if word.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(index) for index, line in enumerate(found.stdout.splitlines()) if line.startswith("GPU")]


def cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan(processes: int | None, launcher: str | None, hostfile: str | None, port: int | None) -> Launch:
    """Choose what is not given: a rank for each GPU, or at most two on the CPU."""
    gpus = len(visible_gpus())
    if gpus:
        if processes and processes > gpus and not hostfile:
            raise ConfigError(f"--gpus {processes}: this machine has {gpus} (CUDA_VISIBLE_DEVICES, nvidia-smi -L)")
        return Launch(processes or gpus, launcher, hostfile, port)
    processes = processes or min(2, cores())
    environment = {
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // processes))),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return Launch(processes, launcher, hostfile, port, environment)


def end_with_parent() -> None:
    """Receive SIGTERM when the process that started this one dies (on Linux)."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_launcher() -> None:
    """Receive SIGTERM when the launcher of this rank dies (on Linux)."""
    if sys.platform != "linux" or "LOCAL_RANK" not in os.environ:
        return
    end_with_parent()
    with contextlib.suppress(OSError, ValueError):  # a parent in another container cannot be seen
        parent = os.getppid()
        runner = _parent_of(parent)
        words = Path(f"/proc/{runner}/cmdline").read_text().split("\0")
        if {"deepspeed", "deepspeed.launcher.runner"} & {os.path.basename(word) for word in words}:
            # DeepSpeed's runner starts DeepSpeed's launcher, which lives on without it.
            threading.Thread(target=_end_with, args=(parent, runner), daemon=True).start()


def _end_with(parent: int, runner: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        while _parent_of(parent) == runner:
            time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def run_ranks(launch: Launch, arguments: Sequence[str]) -> int:
    """Run all ranks; return 0, or the exit code of the first that failed.

    SIGINT and SIGTERM go on to each rank once. The ranks save a checkpoint and end, and this function waits for that.
    """
    received: list[int] = []
    caught = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if _is_heeded(number)]
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in caught}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command, environment in launch.commands(arguments):
            # In a session of its own a rank does not also get the terminal's Ctrl-C.
            started.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            )
        return _wait(started, received)
    finally:
        for process in started:
            if process.poll() is None:
                _end(process, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_heeded(number: int) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN  # nohup ignores SIGHUP


def _wait(started: list[subprocess.Popen[bytes]], received: list[int]) -> int:
    codes: dict[int, int] = {}  # of the processes that have ended, in that order
    asked: set[int] = set()
    deadline, force = float("inf"), signal.SIGTERM
    while len(codes) < len(started):
        while received:
            # SIGHUP would end a rank at once.
            number = signal.SIGINT if received.pop(0) == signal.SIGINT else signal.SIGTERM
            asked |= {128 + number}
            for process in started:
                _pass_on(process, number)
        for process in started:
            code = process.poll()
            if code is not None and process.pid not in codes:
                codes[process.pid] = code if code >= 0 else 128 - code
        if deadline == float("inf") and any(code not in (0, *asked) for code in codes.values()):
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for process in started:
                _end(process, force)
            deadline, force = time.monotonic() + GRACE, signal.SIGKILL
        time.sleep(0.05)
    failed = [code for code in codes.values() if code]
    return next((code for code in failed if code not in asked), failed[0] if failed else 0)


def _pass_on(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a rank, or to the ranks that a launcher has started."""
    for target in _ranks_below(process.pid) or [process]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target.pid, number)


def _ranks_below(pid: int) -> list[Any]:
    """List the ranks that a launcher has started: they have RANK, and their parent has not."""
    import psutil

    found = []
    with contextlib.suppress(psutil.Error):
        if "RANK" not in psutil.Process(pid).environ():
            for child in psutil.Process(pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "RANK" in child.environ() and "RANK" not in child.parent().environ():
                        found.append(child)
    return found


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process and to all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, number)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])
