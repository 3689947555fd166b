"""Run the trainer and kill its process (SIGKILL) at a given moment.

Usage: python -m train_killed MOMENT FLAGS...
"""

import itertools
import multiprocessing
import os
import signal
import sys

from tove_llava.train import run
from tove_llava.train import step_checkpoints as checkpoints
from tove_llava.train.trainer import ToveTrainer

# The owner and name of a function, the number of its last call, and whether that call does its work first.
MOMENTS = {
    "between": (ToveTrainer, "compute_loss", 6, True),  # in step 6, after the checkpoint of step 4
    "writing": (checkpoints, "save_weights", 2, True),  # the second checkpoint has its weights and nothing else
    "publishing": (checkpoints, "publish", 2, False),  # the second checkpoint is all written but has not its name yet
    "saving": (run, "save_checkpoint", 1, False),  # trained to the end, the model not saved
}


def kill_at(moment):
    owner, name, last, works = MOMENTS[moment]
    function, calls = getattr(owner, name), itertools.count(1)

    def counted(*args, **kwargs):
        ends = next(calls) == last
        result = None if ends and not works else function(*args, **kwargs)
        if ends:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def train_until_killed(moment, arguments):
    """Train in a killable fork of this process, which needs no imports."""
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
