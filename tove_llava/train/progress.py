"""What a run shows while it trains: a line of loss terms and gate weights per log, a bar with records per second."""

from typing import Any

from transformers.trainer_callback import ProgressCallback, TrainerCallback

_SHOWN = (
    "loss",
    "lm_loss",
    "aux_loss",
    "merge_loss",
    "grad_norm",
    "learning_rate",
    "samples_per_second",
    "data_wait",
    "gate/entropy",
    "epoch",
)


class TrainingProgress(ProgressCallback):
    """The bar; tqdm itself shows the time that is left."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "samples_per_second" in logs:
            self.training_bar.set_postfix_str(f"{logs['samples_per_second']:.1f} samples/s")
        line = describe(logs)
        if line:
            self.training_bar.write(f"step {state.global_step}: {line}")


class TrainingLines(TrainerCallback):
    """The lines alone, where there is no bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        line = describe(logs or {})
        if state.is_world_process_zero and line:
            print(f"step {state.global_step} of {state.max_steps}: {line}", flush=True)


def describe(logs: dict[str, Any]) -> str:
    """One line of a step's logs; empty for logs that are not a step's."""
    if "lm_loss" not in logs:
        return ""
    shown = [f"{name} {_number(logs[name])}" for name in _SHOWN if name in logs]
    gate = " ".join(
        f"{name.removeprefix('gate/')} {value:.2f}"
        for name, value in logs.items()
        if name.startswith("gate/") and name not in _SHOWN
    )
    return ", ".join([*shown, f"gate: {gate}"] if gate else shown)


def _number(value: Any) -> str:
    number = float(value)
    return f"{number:.3g}" if abs(number) < 1e-3 or abs(number) >= 1e4 else f"{number:.4f}"
