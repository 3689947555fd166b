"""Stop a run on SIGINT or SIGTERM: at once while it loads, after a checkpoint while it trains.

A launcher passes either signal to one rank or to all of them, and waits. The ranks agree at the beginning of their next
step, write a checkpoint together, and exit with 128 plus the signal's number. A terminal and torchrun both pass a
Ctrl-C on, so a second SIGINT within :data:`SAME` seconds is the same Ctrl-C. A later one kills at once.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 1.0


class Interrupted(KeyboardInterrupt):
    """An end by a signal, with the exit code of the process."""

    def __init__(self, signum: int, outcome: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {outcome}")
        self.code = 128 + signum


class _Watch:
    """The signals of this process.

    Python runs a handler only between its own instructions, not while it waits for a GPU or for other ranks. A thread
    therefore reads the signals from the file descriptor to which they are written at once.
    """

    def __init__(self) -> None:
        self.outcome = ""  # of a noted signal; empty while a signal stops the run at once
        self.noted = 0
        self._since = 0.0
        self._reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._writer = writer
        self._former_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._former: dict[int, Any] = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def close(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        self._writer.shutdown(socket.SHUT_WR)  # the thread reads the end, though a data worker may hold a copy
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self.outcome:
            raise Interrupted(signum, "training had not begun; the same command starts it again")

    def _listen(self) -> None:
        while data := self._reader.recv(1):
            signum = data[0]
            if signum not in SIGNALS:
                continue
            if not self.noted:
                self.noted, self._since = signum, time.monotonic()
                if self.outcome and int(os.environ.get("RANK", "0")) == 0:
                    print(f"\n{signal.Signals(signum).name}: {self.outcome}", file=sys.stderr, flush=True)
            elif signum == signal.SIGINT and time.monotonic() - self._since > SAME:
                os._exit(128 + signum)


_watch: _Watch | None = None


@contextmanager
def watching() -> Iterator[None]:
    """Handle the signals of this process; a handler that is there already stays."""
    global _watch
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _watch = watch = _Watch()
    try:
        yield
    finally:
        _watch = None
        watch.close()


def note(outcome: str) -> None:
    """Note signals from now on, instead of stopping at once; say ``outcome`` when one comes."""
    if _watch is not None:
        _watch.outcome = outcome


def noted() -> int:
    """Return the signal that came, or 0."""
    return 0 if _watch is None else _watch.noted


def leave_to_parent() -> None:
    """Ignore the signals in a process that the run ends itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """End the data workers: they ignore the SIGTERM by which multiprocessing would end them."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them
        for worker in workers:
            worker.kill()


Finalize(None, _end_workers, exitpriority=0)  # before multiprocessing waits for them
