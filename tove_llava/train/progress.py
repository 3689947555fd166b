"""The progress bar: loss terms, records per second, and (from tqdm) the time that is left."""

from typing import Any

from transformers.trainer_callback import ProgressCallback

_SHOWN = ("loss", "lm_loss", "aux_loss", "grad_norm", "learning_rate", "samples_per_second", "gate/entropy", "epoch")


class TrainingProgress(ProgressCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "samples_per_second" in logs:
            self.training_bar.set_postfix_str(f"{logs['samples_per_second']:.1f} samples/s")
        shown = [f"{name} {_number(logs[name])}" for name in _SHOWN if name in logs]
        if shown:
            gate = " ".join(
                f"{name.removeprefix('gate/')} {value:.2f}"
                for name, value in logs.items()
                if name.startswith("gate/") and name not in _SHOWN
            )
            line = f"step {state.global_step}: {', '.join(shown)}"
            self.training_bar.write(f"{line}, gate: {gate}" if gate else line)


def _number(value: Any) -> str:
    number = float(value)
    return f"{number:.3g}" if abs(number) < 1e-3 or abs(number) >= 1e4 else f"{number:.4f}"
