"""How far a run is: a bar on a terminal, a line now and then in a log."""

import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """Shows questions answered, their rate and the time left, on standard error.

    Args:
        total: questions to answer now.
        shown: False for silence, as on all processes but the first.
        interval: seconds between lines of a log.
    """

    def __init__(self, total: int, label: str = "", shown: bool = True, interval: float = 15.0) -> None:
        self.total, self.label, self.interval = total, label, interval
        self.done = 0
        self.started = self.said = time.monotonic()
        self.shown = shown and total > 0
        terminal = self.shown and sys.stderr.isatty()
        self.bar: Any = tqdm(total=total, desc=label, unit="q", mininterval=0.5) if terminal else None

    def update(self, done: int) -> None:
        """``done`` of the questions are answered, on all processes together."""
        news, self.done = done - self.done, done
        if self.bar is not None:
            self.bar.update(news)
        elif self.shown and (time.monotonic() - self.said >= self.interval or done >= self.total):
            self.said = time.monotonic()
            print(self.line(self.said - self.started), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """``scenes: 120/300 questions (40 %), 12.5 a second, 0:14 left``."""
        rate = self.done / seconds if seconds > 0 else 0.0
        left = tqdm.format_interval((self.total - self.done) / rate) if rate else "?"
        share = 100 * self.done // self.total
        head = f"{self.label}: " if self.label else ""
        return f"{head}{self.done}/{self.total} questions ({share} %), {rate:.3g} a second, {left} left"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
