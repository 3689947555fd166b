"""Tell the sampler its epoch, and end a run that a signal interrupts."""

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from tove_llava.train import interrupts


class SetEpoch(TrainerCallback):
    """A callback that tells :class:`LengthGroupedSampler` its epoch.

    accelerate does so for its own samplers. Others it does not reach when a run on several ranks is resumed.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class Ends(TrainerCallback):
    """A callback that logs the last step, and ends a run that a signal interrupts."""

    def __init__(self) -> None:
        self.signal = 0
        self._begun = False  # a step of this epoch is done
        self._saved = -1

    def now(self, signal: int, state: TrainerState, control: TrainerControl) -> bool:
        """Return True if the run ends before this step, and a checkpoint of the step before is written.

        In an epoch's first step the answer is False. Its dataloader has drawn from the random state that a checkpoint
        of the step before would need, so the run ends after this step.
        """
        self.signal = signal
        ends = signal != 0 and self._begun
        if ends:
            control.should_save = self._saved != state.global_step
            control.should_training_stop = True
        return ends

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        interrupts.note("training ends after this step, with a checkpoint; a second Ctrl-C kills at once")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = True
        if state.global_step >= state.max_steps:
            control.should_log = True
        elif self.signal:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = state.global_step
