"""Print a run's lines: its logged steps, and its end."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerCallback, TrainerState

from tove_llava.core.plugins import plugin_flags

SLOW_DATA = 0.1  # share of the time spent waiting for data that is worth a word


class TrainingLines(TrainerCallback):
    """A line for each log, with the time that is left."""

    def __init__(self) -> None:
        self._begin: tuple[int, float] | None = None  # the first logged step and its time: earlier steps warm up

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and (measured := evaluation(logs)):
            self.write(f"step {state.global_step} of {state.max_steps}: {measured}")
        if not state.is_world_process_zero or not logs or "lm_loss" not in logs:
            return
        step, now = state.global_step, time.monotonic()
        words = [f"step {step} of {state.max_steps}: {describe(logs)}"]
        if self._begin is None:
            self._begin = step, now
        elif step > self._begin[0]:
            left = (now - self._begin[1]) / (step - self._begin[0]) * (state.max_steps - step)
            words.append(f"ETA {timedelta(seconds=round(left))}")
        self.write(", ".join(words))

    def write(self, line: str) -> None:
        print(line, flush=True)


class TrainingProgress(TrainingLines, ProgressCallback):
    """A bar, with a line above it for each log."""

    def __init__(self) -> None:
        ProgressCallback.__init__(self)
        TrainingLines.__init__(self)

    def write(self, line: str) -> None:
        self.training_bar.write(line)


def progress(bar: bool) -> TrainingLines:
    """Return the callback that shows a run: a bar is for a terminal only."""
    return TrainingProgress() if bar and sys.stderr.isatty() else TrainingLines()


def describe(logs: dict[str, Any]) -> str:
    """Return what a person wants to see of a step's logs; TensorBoard and the log history have the rest."""
    others = [
        f"{name.removesuffix('_loss')} {logs[name]:.4f}"
        for name in ("lm_loss", "merge_loss")
        if name in logs and f"{logs[name]:.4f}" != f"{logs['loss']:.4f}"
    ]
    words = [f"loss {logs['loss']:.4f}" + (f" ({', '.join(others)})" if others else "")]
    if "grad_norm" in logs:
        words.append(f"grad {logs['grad_norm']:.3g}")
    words.append(f"lr {logs['learning_rate']:.2e}")
    if "samples_per_second" in logs:
        words.append(f"{logs['samples_per_second']:,.1f} samples/s")
    if logs.get("data_wait", 0.0) >= SLOW_DATA:
        words.append(f"{logs['data_wait']:.0%} waiting for data")
    return ", ".join(words)


def evaluation(logs: dict[str, Any]) -> str:
    """Return the held-out loss and the benchmarks' scores of a log, or an empty string."""
    words = []
    if "eval_loss" in logs:
        words.append(f"held-out loss {logs['eval_loss']:.4f}" + (", the lowest so far" if logs["eval_best"] else ""))
    scores = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
    words += [f"{name} {scores[name]:.1f}" for name in scores if name not in ("loss", "best") and "/" not in name]
    return "; ".join(words)


def ending(args: TrainingArguments, state: TrainerState, next_stage: str) -> str:
    """Write the last lines of a run: what it learned, where the model is, and what comes next.

    Args:
        next_stage: command of a stage that usually follows, or an empty string.
    """
    folder = args.output_dir
    logged = [entry for entry in state.log_history if "lm_loss" in entry]
    losses = ""
    if logged:
        first, last = logged[0], logged[-1]
        losses = f", loss {first['loss']:.4f} at step {first['step']}"
        losses += f", {last['loss']:.4f} at step {last['step']}" if last is not first else ""
        losses += f", last lm_loss {last['lm_loss']:.6f}"
    count = "1 step" if state.global_step == 1 else f"{state.global_step} steps"
    lines = [f"saved {folder} after {count}{losses}"]
    if "tensorboard" in args.report_to:
        curves = os.environ.get("TENSORBOARD_LOGGING_DIR", Path(folder) / "runs")
        lines.append(f"curves: tensorboard --logdir {curves}")
    plugins = "".join(f" {word}" for word in plugin_flags())
    commands = [next_stage] if next_stage else []
    commands.append(f"tove-llava chat --model {folder} --image FILE{plugins}")
    if not next_stage:
        commands.append(f"tove-llava eval --model {folder} --benchmark scenes{plugins}")
    return "\n".join([*lines, "next:   " + "\n        ".join(commands)])
