"""Train with losses over the global batch and atomic checkpoints.

Objective of one optimizer step, over the accumulation windows of all ranks::

    L = sum of token cross-entropies / number of supervised tokens
        + c_aux * L_aux(gate statistics of all images)  +  c_merge * sum of L_merge / number of images

DDP and DeepSpeed average gradients over ranks. Each rank's share of the first and third terms is therefore multiplied
by the number of ranks. The second term is added unchanged on every rank: its statistics are summed over ranks already
(:func:`tove_llava.tower.all_reduce_statistics`). Nothing is divided by the number of accumulation steps.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from tove_llava.core.errors import CheckpointError, NonFiniteError
from tove_llava.core.files import read_json_object, writing
from tove_llava.data import LengthGroupedSampler, LlavaCollator, LlavaDataset, WeightedSampler
from tove_llava.llava import ToveLlavaForConditionalGeneration, VisionInputs
from tove_llava.tower import ToveVisionModel, all_reduce_statistics, balance_loss
from tove_llava.train import interrupts, step_checkpoints
from tove_llava.train.benchmark_scores import FOLDER
from tove_llava.train.callbacks import Ends, SetEpoch
from tove_llava.train.lines import progress
from tove_llava.train.merging import FurtherImages
from tove_llava.train.meter import Meter
from tove_llava.train.numbered_records import FURTHER, RECORD, Numbered, NumberedCollator
from tove_llava.train.run_files import CHECKPOINT, STAGING
from tove_llava.train.stages import ENCODER, PROJECTOR, TOWER, Trainable, make_optimizer
from tove_llava.train.validation import Validation, keep_best, mean_loss
from tove_llava.train.window import Window, draw_noise, open_window


class ToveTrainer(Trainer):
    """A trainer of one stage.

    Args:
        model: a ToVE-LLaVA whose stage has been applied.
        args: transformers' training arguments.
        trainable: from :func:`tove_llava.train.stages.freeze`.
        parameter_groups: of the optimizer.
        group_by_modality_length: LLaVA's grouped sampling, instead of a plain random order.
        further_images: images for the merge loss that come with each record.
        validation: held-out records, whose loss is measured when ``args.eval_strategy`` says.
        benchmarks: answers benchmarks then too, and returns their scores; given the folder for the answers.
    """

    model: ToveLlavaForConditionalGeneration

    def __init__(
        self,
        model: ToveLlavaForConditionalGeneration,
        args: TrainingArguments,
        *,
        trainable: Trainable,
        dataset: LlavaDataset,
        collator: LlavaCollator,
        parameter_groups: list[dict[str, Any]],
        group_by_modality_length: bool = False,
        further_images: FurtherImages | None = None,
        validation: Validation | None = None,
        benchmarks: Callable[[Path], Mapping[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self._trainable = trainable
        self._groups = parameter_groups
        self._records = dataset
        self._keep_checkpoints = args.save_total_limit
        if args.data_seed is None:
            args.data_seed = args.seed  # accelerate seeds a SeedableRandomSampler with it
        self._sampler = self._make_sampler(dataset, args, group_by_modality_length)
        self._window: Window | None = None
        self._validation, self._benchmarks = validation, benchmarks
        self._ends = Ends()
        super().__init__(
            model=model,
            args=args,
            train_dataset=Numbered(dataset, further_images),
            eval_dataset=[],  # evaluate() has its own data
            data_collator=NumberedCollator(collator),
            callbacks=[SetEpoch(self._sampler), self._ends, *(callbacks or [])],
        )
        # Both: differentiate the result of compute_loss as it is, not divided by the accumulation steps.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        vision = model.config.vision_config
        self._coefficient = vision.router_aux_loss_coef
        has_gate = model.tower.fusion.balance_statistics(None) is not None
        self._columns = [*vision.expert_names, *(["null"] if vision.null_slot else [])] if has_gate else []
        self._merge_coefficient = getattr(model.tower, "merge_coefficient", 0.0)
        # While a tower is merged, its teacher's experts are in eval mode, where a bad one is left out.
        self._encoders = model.tower.frozen if isinstance(model.tower, ToveVisionModel) else None
        self.args.logging_nan_inf_filter = False  # it waits for the device in every micro-batch; _check_finite() raises
        self._meter = Meter(self._columns, self.args.device)
        self.remove_callback(PrinterCallback)
        self.add_callback(progress(bar=self.pop_callback(ProgressCallback) is not None))

    # -- data ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def _make_sampler(dataset: LlavaDataset, args: TrainingArguments, grouped: bool) -> "Sampler[int]":
        by_length = None
        if grouped:
            side_by_side = args.world_size * args.gradient_accumulation_steps
            by_length = LengthGroupedSampler(
                dataset.modality_lengths, args.per_device_train_batch_size, side_by_side, seed=args.data_seed
            )
        if any(weight != 1 for weight in dataset.weights):
            return WeightedSampler(dataset.sizes, dataset.weights, args.data_seed or 0, by_length)
        return by_length or SeedableRandomSampler(dataset, data_seed=args.data_seed)

    def _get_train_sampler(self, train_dataset: Any = None) -> "Sampler[int]":
        return self._sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int | None]:
        batches = []
        for _ in range(num_batches):
            with self._meter.waiting():
                batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        if not batches:
            return [], None
        window = open_window(
            batches, self.args.device, always_tower=self._always_runs_tower(), signal=interrupts.noted()
        )
        if self._ends.now(window.signal, self.state, self.control):
            return [], None
        vision = self.model.config.vision_config
        if self._columns and vision.noisy_gating and window.num_images:
            shape = (window.num_images, vision.num_patches, len(self._columns))
            window.noise = draw_noise(shape, self.args.seed, self.state.global_step)
        self._window = window
        return batches, max(window.tokens, 1)

    @property
    def interrupted(self) -> int:
        """Return the signal that ended the run before its last step, or 0."""
        return self._ends.signal if self.state.global_step < self.state.max_steps else 0

    def _always_runs_tower(self) -> bool:
        """Return True if micro-batches without images must run the tower too.

        True when nothing but projector and tower trains. Also under ZeRO-3 and optimizer offload: both reset a gradient
        in the first micro-batch of a window and reduce it in the last, so a parameter that is skipped there would be
        updated by the gradient of an earlier step.
        """
        if set(self._trainable.parts) <= {PROJECTOR, TOWER, ENCODER}:
            return True
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if plugin is None:
            return False
        zero = plugin.deepspeed_config.get("zero_optimization", {})
        return zero.get("stage") == 3 or zero.get("offload_optimizer", {}).get("device", "none") != "none"

    # -- loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        window = self._window
        assert window is not None and num_items_in_batch is not None
        records = inputs[RECORD]
        with nullcontext() if self._encoders is None else self._encoders.hub.deferring():
            outputs = model(
                **self._model_inputs(inputs, window),
                num_items_in_batch=num_items_in_batch,
                add_aux_loss=False,
                output_routing=True,
                use_cache=False,
            )
        lm_loss = outputs.lm_loss
        loss = lm_loss * self.accelerator.num_processes
        self._meter.add("lm_loss", lm_loss)
        if outputs.merge_loss is not None:
            merge_loss = outputs.merge_loss.sum() / max(window.num_images, 1)
            loss = loss + self._merge_coefficient * merge_loss.to(loss) * self.accelerator.num_processes
            self._meter.add("merge_loss", merge_loss)
        if outputs.gate_inputs is not None:
            window.gate_inputs.append(outputs.gate_inputs)
            self._meter.add_routing(outputs.routing)
        if window.is_last:
            aux_loss = self._window_balance_loss(window)
            if aux_loss is not None:
                loss = loss + self._coefficient * aux_loss.to(loss)
                self._meter.add("aux_loss", aux_loss / self.accelerator.num_processes)
            self._meter.add("steps", 1 / self.accelerator.num_processes)
            self._meter.add_samples(window.samples / self.accelerator.num_processes)
        window.losses.append((loss.detach(), records))
        if window.is_last:
            self._check_finite(window)
        window.step += 1
        return (loss, outputs) if return_outputs else loss

    def _model_inputs(self, batch: dict[str, Any], window: Window) -> dict[str, Any]:
        """Return the model's arguments for a batch; a rank without images may get a blank one."""
        inputs = dict(batch)
        del inputs[RECORD]
        vision = VisionInputs(features=inputs.pop("vision_features", None), further=inputs.pop(FURTHER, 0))
        if window.runs_tower:
            if vision.features is not None:
                vision.features = vision.features.to(self.args.device, self.model.tower.dtype, non_blocking=True)
            if "pixel_values" in inputs or vision.features is not None:
                vision.gate_noise = window.local_noise()
            else:
                pixels, vision = self._dummy_image(inputs["input_ids"].device)
                inputs |= pixels
        return {**inputs, "vision": vision}

    def _window_balance_loss(self, window: Window) -> torch.Tensor | None:
        """Return the balance loss of the window. Every rank calls this."""
        if not self._columns or not window.num_images:
            return None
        fusion = self.model.tower.fusion
        # One pass of the gate on every rank, with images or without: ZeRO-3 gathers weights for each pass.
        statistics = fusion.balance_statistics(window.gate_inputs)
        assert statistics is not None  # a fusion without a gate has no columns
        return balance_loss(all_reduce_statistics(statistics))

    def _dummy_image(self, device: torch.device) -> tuple[dict[str, Any], VisionInputs]:
        """Return an image of zeros, for a rank without images."""
        dtype = next(self.model.model.multi_modal_projector.parameters()).dtype
        tokens = self.model.config.vision_config.num_patches
        noise = torch.zeros(1, tokens, len(self._columns)) if self._columns else None
        blank = self.model.tower.blank_inputs(device, dtype)
        return blank, VisionInputs(features=blank.pop("vision_features", None), gate_noise=noise, dummy=True)

    def _check_finite(self, window: Window) -> None:
        """Wait for the device, once a step, and raise before anything of it is applied."""
        if self._encoders is not None:
            self._encoders.hub.check_deferred()
        loss, records = window.first_non_finite()
        if loss is None:
            return
        names = [self._records.records[i].where for i in records]
        raise NonFiniteError(
            f"the loss is {loss} at step {self.state.global_step + 1} on rank {self.args.process_index}; "
            f"nothing of this step was applied. Records: {', '.join(names)}. Look at them, lower the learning rate, or "
            "train in bf16 instead of fp16. The last checkpoint is intact: the same command resumes from it"
        )

    def evaluate(self, *_: Any, **options: Any) -> dict[str, float]:
        """Log the loss on the held-out records, and scores of benchmarks; keep the model of the lowest loss so far."""
        args, model, validation = self.args, self.model_wrapped, self._validation
        metrics: dict[str, float] = {}
        model.eval()
        if validation is not None:
            batches = validation.batches(args.per_device_eval_batch_size, args.dataloader_num_workers)
            metrics["eval_loss"] = mean_loss(batches, self._summed_loss, args.device)
        if self._benchmarks is not None:
            with self.compute_loss_context_manager():
                metrics |= self._benchmarks(Path(args.output_dir) / FOLDER / f"step-{self.state.global_step}")
        model.train()
        loss, lowest = metrics.get("eval_loss", math.inf), self.state.best_metric
        best = validation is not None and (lowest is None or loss < lowest)
        if best:
            self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
        self.log(metrics | ({} if validation is None else {"eval_best": float(best)}))
        if best and validation is not None and validation.keep is not None:
            tensors = step_checkpoints.gather(self._trainable, self.args.should_save)  # every rank takes part
            if self.args.should_save:
                keep = validation.keep
                keep_best(Path(self.args.output_dir), lambda folder: keep(folder, tensors))
            self._barrier()
        self._meter.start_clock()  # speed is that of training
        handler: Any = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _summed_loss(self, batch: Any) -> tuple[torch.Tensor, int]:
        """Return this rank's sum of cross-entropies, and the supervised tokens of all ranks."""
        window = open_window([batch], self.args.device, always_tower=self._always_runs_tower())
        inputs = self._model_inputs(self._prepare_inputs(batch), window)
        with self.compute_loss_context_manager():
            outputs = self.model_wrapped(**inputs, num_items_in_batch=1, add_aux_loss=False, use_cache=False)
        return outputs.lm_loss, window.tokens

    # -- optimizer and logs -------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:  # type: ignore[has-type]
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = make_optimizer(self._groups, cls, kwargs)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._meter.read(self._coefficient, self._merge_coefficient)
        super().log(logs, start_time)

    # -- checkpoints of a run -----------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write a checkpoint, then rename it: ``checkpoint-N`` is always whole."""
        final = Path(self.args.output_dir) / f"{CHECKPOINT}{self.state.global_step}"
        staging = final.with_name(f"{STAGING}{self.state.global_step}")
        try:
            with writing(final):
                self._write_checkpoint(staging, final)
        except CheckpointError:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def _write_checkpoint(self, staging: Path, final: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self._barrier()
        step_checkpoints.save_weights(
            staging / step_checkpoints.WEIGHTS, self._trainable, is_writer=self.args.should_save
        )
        self._save_optimizer_and_scheduler(str(staging))
        self._save_rng_state(str(staging))
        meter = self._meter.state()
        self.store_flos()
        self._barrier()
        if self.args.should_save:
            (staging / step_checkpoints.METER).write_text(json.dumps(meter))
            self.state.save_to_json(str(staging / "trainer_state.json"))
            step_checkpoints.publish(staging, final, self._keep_checkpoints)
        self._barrier()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            # Frozen weights come from their source, not from each checkpoint.
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        step_checkpoints.load_weights(Path(resume_from_checkpoint) / step_checkpoints.WEIGHTS, self._trainable)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # Without the checkpoint: through transformers, DeepSpeed would look for the frozen weights in it.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._meter.start_clock()
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:
                self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            meter = read_json_object(Path(resume_from_checkpoint) / step_checkpoints.METER, finite=False)
            self._meter.restore(meter, self.args.process_index)
        return prepared

    def _barrier(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
