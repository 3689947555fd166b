"""The training process of checkpoints.py: starts, saves, resumes and loads a run of each stage.

It takes the path of a plan, a JSON object, and writes ``result.json`` beside it:

- stages: name -> arguments of the trainer, without output_dir.
- folder: where runs go, STAGE/run.
- repeats: of each timed thing.

A start is timed from the settings to the first step; models are built anew each time, libraries are imported already.
"""

import functools
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 3  # each ends with a checkpoint


class Clock:
    """Seconds that a run took to its first step, and that it spent writing each checkpoint."""

    def __init__(self) -> None:
        self.began, self.ready, self.stepped = time.perf_counter(), 0.0, 0.0
        self.writes: list[float] = []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Timed(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.ready = clock.ready or time.perf_counter() - clock.began

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.stepped = time.perf_counter()

            def on_save(self, *_: Any, **__: Any) -> None:
                clock.writes.append(time.perf_counter() - clock.stepped)

        return Timed()


def train(arguments: list[str], output: Path) -> Clock:
    """Runs the trainer."""
    from tove_llava.train import run

    trainer = run.ToveTrainer
    clock = Clock()
    run.ToveTrainer = functools.partial(trainer, callbacks=[clock.callback()])  # type: ignore[misc]
    try:
        code = run.main([*arguments, "--output_dir", str(output)])
    finally:
        run.ToveTrainer = trainer  # type: ignore[misc]
    if code:
        sys.exit(code)
    return clock


def undo_last_step(output: Path) -> None:
    """Leaves what an interruption in the last step would have left."""
    for entry in output.iterdir():
        if entry.is_file() and entry.name != "run.json":
            entry.unlink()
    shutil.rmtree(output / f"checkpoint-{STEPS}")


def sizes(folder: Path) -> dict[str, int]:
    """Bytes by file, relative to the folder; checkpoints to resume from are left out."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    names = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    return {name: size for name, size in names.items() if not name.startswith("checkpoint-")}


def measure(arguments: list[str], folder: Path, repeats: int) -> dict[str, Any]:
    """Sizes by file, and seconds of each repeat. The first run, slower than others of its process, is not counted."""
    from tove_llava import load_model

    arguments = [*arguments, "--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", "1"]
    arguments += ["--save_total_limit", "2", "--logging_strategy", "no"]
    run = folder / "run"
    train(arguments, run)
    result: dict[str, Any] = {
        "folder_bytes": sizes(run),
        "checkpoint_bytes": sizes(run / f"checkpoint-{STEPS}"),
        "start": [],
        "write": [],
        "resume": [],
        "load": [],
    }
    for repeat in range(repeats):
        fresh = folder / f"fresh-{repeat}"
        clock = train(arguments, fresh)
        result["start"].append(clock.ready)
        result["write"] += clock.writes
        shutil.rmtree(fresh)
        undo_last_step(run)
        result["resume"].append(train(arguments, run).ready)
        began = time.perf_counter()
        load_model(run)
        result["load"].append(time.perf_counter() - began)
    return result


def main() -> None:
    plan_file = Path(sys.argv[1])
    plan = json.loads(plan_file.read_text())
    results = {
        name: measure(arguments, Path(plan["folder"]) / name, plan["repeats"])
        for name, arguments in plan["stages"].items()
    }
    (plan_file.parent / "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
