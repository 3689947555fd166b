"""Start a verb in a process, with its output in a file.

Both ways return the process's id. The process has a session of its own, so that an interrupt at the terminal does not
reach it. It keeps the lock of its job: a spawned one by the descriptor ``lock``, a forked one has all of them.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

Main = Callable[[Sequence[str]], int]


def spawn_job(words: Sequence[str], environment: Mapping[str, str], log: int, lock: int) -> int:
    """Start a new interpreter."""
    os.set_inheritable(lock, True)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, log, 1),
        (os.POSIX_SPAWN_DUP2, log, 2),
    ]
    command = [sys.executable, "-m", "tove_llava", *words]
    return os.posix_spawn(sys.executable, command, environment, file_actions=actions, setsid=True)


def fork_job(main: Main, words: Sequence[str], environment: Mapping[str, str], log: int) -> int:
    """Fork this process: the job has its imports, which take seconds.

    It must come before this process uses CUDA, or computes on several threads.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(environment)
        _set_threads(int(environment["OMP_NUM_THREADS"]))
        code = main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def import_what_jobs_need() -> None:
    """Import the libraries of training and evaluation, before forks."""
    import tove_llava.eval.runner
    import tove_llava.inference.generation
    import tove_llava.train.feature_filling
    import tove_llava.train.run  # noqa: F401


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)  # OMP_NUM_THREADS is read only when torch is imported
