"""Run the trainer and kill its own process (SIGKILL) at a given moment.

Usage: python -m train_killed MOMENT FLAGS...
"""

import multiprocessing
import os
import signal
import sys

from tove_llava.train import run
from tove_llava.train import step_checkpoints as checkpoints
from tove_llava.train.trainer import ToveTrainer


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def after(function, count, *, first):
    """``function`` until its ``count``-th call, which ends the process; with ``first`` once it has done its work."""
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and not first:
            die()
        result = function(*args, **kwargs)
        if calls == count:
            die()
        return result

    return counted


def kill_at(moment):
    if moment == "between":  # in step 6, after the checkpoint of step 4
        ToveTrainer.compute_loss = after(ToveTrainer.compute_loss, 6, first=True)
    elif moment == "writing":  # the second checkpoint has its weights and nothing else
        checkpoints.save_weights = after(checkpoints.save_weights, 2, first=True)
    elif moment == "publishing":  # the second checkpoint is all written but has not its name yet
        checkpoints.publish = after(checkpoints.publish, 2, first=False)
    elif moment == "saving":  # trained to the end, the model not saved
        run.save_checkpoint = after(run.save_checkpoint, 1, first=False)
    else:
        raise SystemExit(f"unknown moment {moment}")


def train_until_killed(moment, arguments):
    """Train in a fork of this process, which is as mortal as a fresh one and needs no imports."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=(moment, arguments))
    process.start()
    process.join(timeout=600)
    assert process.exitcode == -signal.SIGKILL, f"the run ended by itself: {process.exitcode}"


def _train(moment, arguments):
    kill_at(moment)
    os._exit(run.main(arguments))


if __name__ == "__main__":
    kill_at(sys.argv[1])
    sys.exit(run.main(sys.argv[2:]))
