"""One rank of scaling.py: the trainer on a core of its own.

It trains when it is its group's turn. The deepspeed launcher starts it with the path of a plan, a JSON object:

- cores: of the group's ranks.
- driver: process id of scaling.py; without it no turn would come, and the rank ends.
- runs: [{"name": of the run, "arguments": [of the trainer]}], one after the other in this process.
- folder: where the turns are announced. The driver writes ``RUN.go.TURN``, JSON ``{"warmup": W, "steps": N}``; each
  rank trains W + N steps and writes ``RUN.done.TURN.RANK`` with the seconds of each of the last N, and the seconds of
  its processor in all of them. With N = 0 the run ends.
"""

import functools
import itertools
import json
import os
import sys
import time
from pathlib import Path

POLL = 0.01  # seconds between two checks for a turn


def main() -> int:
    plan = json.loads(Path(sys.argv[1]).read_text())
    rank = int(os.environ["LOCAL_RANK"])
    os.sched_setaffinity(0, {plan["cores"][rank]})  # before torch starts threads

    import torch
    from transformers import TrainerCallback

    from tove_llava.train import run

    torch.set_num_threads(1)

    class Turns(TrainerCallback):
        """Holds the trainer back between two turns, and times it in them."""

        def __init__(self, name: str) -> None:
            self.name, self.turn, self.warmup, self.left = name, 0, 0, 0
            self.clock: list[float] = []

        def on_step_begin(self, args, state, control, **_):
            if self.left:
                return
            order = self.next_order()
            self.warmup, self.left = order["warmup"], order["warmup"] + order["steps"]
            if not order["steps"]:
                self.left = -1
                control.should_training_stop = True

        def next_order(self) -> dict[str, int]:
            file = Path(plan["folder"]) / f"{self.name}.go.{self.turn}"
            while not file.is_file():
                os.kill(plan["driver"], 0)  # ProcessLookupError when it is gone
                time.sleep(POLL)
            return json.loads(file.read_text())

        def on_step_end(self, args, state, control, **_):
            if self.left < 0:
                return
            self.left -= 1
            self.warmup -= 1
            if self.warmup == 0:
                self.clock, self.cpu = [], time.process_time()
            self.clock.append(time.perf_counter())
            if self.left == 0:
                took = {
                    "steps": [after - before for before, after in itertools.pairwise(self.clock)],
                    "cpu": time.process_time() - self.cpu,
                }
                write_json(Path(plan["folder"]) / f"{self.name}.done.{self.turn}.{rank}", took)
                self.turn += 1

    trainer = run.ToveTrainer
    for index, entry in enumerate(plan["runs"]):
        run.ToveTrainer = functools.partial(trainer, callbacks=[Turns(entry["name"])])
        is_last = index == len(plan["runs"]) - 1
        code = (run.run_as_process if is_last else run.main)(entry["arguments"])
        if code:
            return code
    return 0


def write_json(file: Path, content: object) -> None:
    """Write a file whole, because another process waits for it."""
    staged = file.with_name(f"{file.name}.new")
    staged.write_text(json.dumps(content))
    staged.rename(file)


if __name__ == "__main__":
    sys.exit(main())
