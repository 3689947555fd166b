"""Ask the Hugging Face hub: say so, and wait ten seconds for its answer."""

import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from huggingface_hub import constants, get_session, is_offline_mode
from huggingface_hub.utils import build_hf_headers

LIMIT = 10  # seconds
_silent = (-60.0, "")  # when the hub last gave no answer, and why


@contextmanager
def asking(repository: str | None) -> Iterator[None]:
    """Say that the hub is asked for a repository; read only its cache if the hub does not answer."""
    if repository is None or is_offline_mode():
        yield
        return
    _say(f"asking {constants.ENDPOINT} for {repository} ({LIMIT} s; HF_HUB_OFFLINE=1 reads only the cache)")
    if not silence():
        answer(repository)
    reason, patience = silence(), socket.getdefaulttimeout()
    if reason:
        _say(f"{reason}; only its cache is read")
    socket.setdefaulttimeout(LIMIT)  # for libraries that set none
    constants.HF_HUB_OFFLINE = bool(reason)  # else each request would be repeated for half a minute
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
        socket.setdefaulttimeout(patience)


def answer(repository: str) -> int | None:
    """Return the status that the hub answers for a repository; None if it does not (:func:`silence`)."""
    global _silent
    found: queue.SimpleQueue[tuple[int | None, str]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            url = f"{constants.ENDPOINT}/{repository}/resolve/main/README.md"
            found.put((get_session().head(url, headers=build_hf_headers(), timeout=LIMIT).status_code, ""))
        except Exception as error:  # of any library below
            found.put((None, str(error) or type(error).__name__))

    threading.Thread(target=ask, daemon=True).start()  # a name server may not answer at all
    try:
        status, reason = found.get(timeout=LIMIT)
    except queue.Empty:
        status, reason = None, f"nothing in {LIMIT} s"
    if status is None:
        _silent = (time.monotonic(), f"the hub does not answer ({reason})")
    return status


def silence() -> str:
    """Return why the hub gave no answer within the last minute; empty if it did or was not asked."""
    return _silent[1] if time.monotonic() - _silent[0] < 60 else ""


@cache  # once a process
def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"tove-llava: {text}", file=sys.stderr, flush=True)
