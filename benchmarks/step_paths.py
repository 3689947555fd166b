"""Set a model before its step is timed: fast, or original."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from common import Bench
from measuring import GB, held_memory, reason_of
from step_parts import TrainingStep

from tove_llava.core.errors import ConfigError
from tove_llava.llava.adapters import inputs_left_to_autocast
from tove_llava.llava.kernels import check_kernels, fused_kernels
from tove_llava.llava.varlen import packed_rows
from tove_llava.presets import StagePreset
from tove_llava.train.recomputation import FULL, NONE, SELECTIVE, set_checkpointing
from tove_llava.train.shapes import kept_by_layer

MEMORY_GB = 75.0  # that a step may take
MARGIN = 4 * 2**30  # of it, left to fragments and to what the budget does not count
EAGER = "eager"


class FastPath:
    """The fastest settings: unpadded rows, supervised logits, checkpointing, fused kernels, concurrent encoders.

    Attributes:
        kind, budget: of checkpointing; the budget in GiB.
        kernels: whether they are fused.
        execution: of the tower: --execution, else ``concurrent`` on a GPU, where ``compiled`` takes minutes, and
            ``eager`` on a CPU.
        fallback: why it is not that one but ``eager``.
    """

    def __init__(self, bench: Bench, step: TrainingStep, stage: StagePreset) -> None:
        on_gpu = bench.device.type == "cuda"
        self.bench, self.step, self.stage = bench, step, stage
        self.kind = SELECTIVE if on_gpu else NONE
        self.budget: float | None = bench.args.checkpointing_gib if on_gpu else None
        self.kernels = _can_fuse(bench)
        self.execution: str = bench.args.execution or ("concurrent" if on_gpu else EAGER)
        self.fallback: str | None = None

    @contextmanager
    def on(self, pictures: Sequence[torch.Tensor]) -> Iterator[None]:
        """Apply the settings in a ``with`` block.

        Args:
            pictures: of the batches to come. The tower is compiled and recorded for their sizes here.
        """
        model, language = self.step.model, self.step.model.model.language_model
        whole = kept_by_layer(language, self.step.trainable, self.stage.lora)
        try:
            self._set_tower(pictures)
            set_checkpointing(model, self.kind, budget_gib=self.budget, whole=whole)
            kernels = fused_kernels(language) if self.kernels else nullcontext()
            casts = nullcontext() if self.step.dtype == torch.float32 else inputs_left_to_autocast(model)
            with packed_rows(language), kernels, casts:
                yield
        finally:
            set_checkpointing(model, NONE)
            model.tower.set_execution(EAGER)

    def _set_tower(self, pictures: Sequence[torch.Tensor]) -> None:
        """Set the tower; a default that cannot run becomes ``eager``."""
        tower = self.step.model.tower
        try:
            tower.set_execution(self.execution)
            for pixels in {len(x): x for x in pictures}.values() if self.execution != EAGER else ():
                self.step.encode(pixels)
        except (ConfigError, torch.OutOfMemoryError) as error:
            if self.bench.args.execution:
                raise
            self.execution, self.fallback = EAGER, reason_of(error)
            tower.set_execution(EAGER)

    def fit_budget(self, padded: dict, pictures: Sequence[torch.Tensor]) -> None:
        """Fit the budget on a GPU to what two steps leave free."""
        if self.kind != SELECTIVE or self.budget is not None:
            return
        with original_recipe(self.step):
            self.step(padded)
        self._set_tower(pictures)  # a CUDA graph keeps its memory
        total = torch.cuda.get_device_properties(self.bench.device).total_memory
        goal = min(total, int(MEMORY_GB * GB))
        self.budget = round(max(0, goal - held_memory(self.bench.device) - MARGIN) / 2**30, 1)


@contextmanager
def original_recipe(step: TrainingStep) -> Iterator[None]:
    """Compute layers twice and encoders in turn, in a ``with`` block."""
    set_checkpointing(step.model, FULL)
    step.model.tower.set_execution(EAGER)
    try:
        yield
    finally:
        set_checkpointing(step.model, NONE)


def _can_fuse(bench: Bench) -> bool:
    try:
        check_kernels(bench.device)
    except ConfigError:
        return False
    return bench.device.type == "cuda"
