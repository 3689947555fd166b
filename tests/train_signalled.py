"""Run the trainer and send its process signals at a given step.

Usage: python -m train_signalled FILE, where FILE holds a JSON list of argument lists: of a whole run, and of the same
run that a signal to the last rank interrupts and that is then resumed.
"""

import gc
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from tove_llava.cli import main as cli
from tove_llava.train import run
from tove_llava.train.trainer import ToveTrainer


def signal_at(step, *signals, pause=0.0, send=os.kill, owner=ToveTrainer, name="compute_loss"):
    """Send this process signals, in the first micro-batch of a step by default."""
    function, calls = getattr(owner, name), itertools.count(1)

    def counted(*args, **kwargs):
        if next(calls) == step:
            for number in signals:
                send(os.getpid(), number)
                time.sleep(pause)
        return function(*args, **kwargs)

    setattr(owner, name, counted)
    return lambda: setattr(owner, name, function)


def train_in_fork(arguments, *at, **options):
    """Run the verb in a fork of this process, signalled as :func:`signal_at` says; return its exit code."""

    def train():
        os.setsid()  # a process group of its own, as a terminal's command has
        signal_at(*at, **options)
        os._exit(cli(["train", *arguments]))

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    process.join(timeout=600)
    return process.exitcode


if __name__ == "__main__":
    gc.freeze()
    whole, interrupted = json.loads(Path(sys.argv[1]).read_text())
    assert run.main(whole) == 0
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    restore = signal_at(6, signal.SIGTERM) if last else lambda: None
    assert run.main(interrupted) == 128 + signal.SIGTERM
    restore()
    sys.exit(run.run_as_process(interrupted))
