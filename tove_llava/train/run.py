"""Run a training stage, from its settings to a saved checkpoint."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import LlavaProcessor, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tove_llava.checkpoints.card import CARD
from tove_llava.checkpoints.manifest import MANIFEST, Manifest
from tove_llava.checkpoints.saving import save_checkpoint
from tove_llava.core.errors import ConfigError, ToveError
from tove_llava.core.files import adding, read_json_object
from tove_llava.core.locks import locked, sweep
from tove_llava.core.logs import quiet_transformers
from tove_llava.core.plugins import take_plugin_flags
from tove_llava.data import LlavaCollator, LlavaDataset, WeightedSampler, get_template
from tove_llava.llava.adapters import inputs_left_to_autocast
from tove_llava.llava.kernels import check_kernels, fused_kernels
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration
from tove_llava.llava.processing import build_processor
from tove_llava.llava.quantization import recorded, set_compute_dtype
from tove_llava.llava.varlen import packed_rows
from tove_llava.presets import StagePreset
from tove_llava.train import step_checkpoints
from tove_llava.train.arguments import further_flags, parse
from tove_llava.train.benchmark_scores import MakeBenchmarks, read_benchmarks, scores_of
from tove_llava.train.flags import help_page
from tove_llava.train.interrupts import Interrupted, note, watching
from tove_llava.train.launcher import end_with_launcher
from tove_llava.train.lines import ending
from tove_llava.train.merging import MergingTower
from tove_llava.train.numbered_records import Numbered, NumberedCollator, worker_errors
from tove_llava.train.plan import planned_steps, print_config, print_sizes
from tove_llava.train.recomputation import set_checkpointing
from tove_llava.train.run_files import CHECKPOINT, STATE, complete, incomplete
from tove_llava.train.run_record import is_finished, run_record, stage_history, write_record
from tove_llava.train.run_settings import Settings
from tove_llava.train.shapes import kept_by_layer
from tove_llava.train.stage_data import make_dataset, make_further_images
from tove_llava.train.stages import ENCODER, LANGUAGE, LORA, MERGE_OPTIMIZERS, Trainable, freeze, parameter_groups
from tove_llava.train.start import Start, make_start
from tove_llava.train.trainer import ToveTrainer
from tove_llava.train.validation import Validation


def run(settings: Settings, make_benchmarks: MakeBenchmarks | None = None) -> None:
    """Train one stage and save its checkpoint into ``settings.output_dir``.

    An interrupted run resumes from its last complete checkpoint. A finished run is left as it is.

    Args:
        make_benchmarks: reads the benchmarks that the model answers while it trains.

    Raises:
        ToveError: a setting, record, image or checkpoint is unusable, the loss is not finite, or another process
            writes the folder.
        Interrupted: a signal ended the run (:mod:`tove_llava.train.interrupts`).
    """
    settings.check()
    record = run_record(settings)
    if is_finished(settings.output_dir, record):
        _say(f"{settings.output_dir} holds this run already, finished; nothing to do. Remove the folder to train again")
        if _is_main():
            sweep(settings.output_dir)
        return
    with locked(settings.output_dir) if _is_main() else nullcontext(), worker_errors():
        _run(settings, record, make_benchmarks)


def _run(settings: Settings, record: dict[str, Any], make_benchmarks: MakeBenchmarks | None) -> None:
    _check_template(settings)
    if settings.stage.fused_kernels:
        check_kernels(settings.device())
    benchmarks = read_benchmarks(settings, make_benchmarks)
    unset_hf_deepspeed_config()  # left by an earlier run in this process; the model is built without DeepSpeed
    seed = settings.training.get("seed", 42)
    set_seed(seed)
    start = make_start(settings.preset, settings.stage, settings.pretrained)
    processor = start.processor
    about = get_template(settings.stage.template).check(processor.tokenizer)
    if about:
        _say(f"chat template: {about}")
    dataset = make_dataset(settings, processor, start.vision)
    _say(f"data: {dataset.report}")
    held_out = None if settings.eval_data_path is None else make_dataset(settings, processor, start.vision, True)
    if held_out is not None:
        _say(f"held-out data: {held_out.report}")
    batch = settings.training.get("per_device_train_batch_size", 8) * int(os.environ.get("WORLD_SIZE", "1"))
    planned_steps(len(WeightedSampler(dataset.sizes, dataset.weights, 0)), batch, settings.training)
    stages = stage_history(settings, len(dataset), about)

    model, trainable = _make_model(settings, start, seed)
    resume = last_checkpoint(settings.output_dir)
    if _is_main():
        write_record(settings.output_dir, record)
    if resume is not None and _is_last_step(resume):
        _say(f"{resume} is the last step of this run; only saving was left to do")
        step_checkpoints.load_weights(resume / step_checkpoints.WEIGHTS, trainable)
        if _is_main():
            step_checkpoints.prune(settings.output_dir, settings.training.get("save_total_limit"))
            tensors = step_checkpoints.gather(trainable, True)
            with _adding(settings.output_dir) as folder:
                _save(settings, start, model, trainable, tensors, stages, folder)
                shutil.copyfile(resume / STATE, folder / STATE)
        return

    # From here on DeepSpeed is configured: under ZeRO-3 it would partition a model while it is built.
    _keep_deepspeed_from_compiling()
    args = settings.training_arguments()
    _use_master_weights(args, trainable)
    keep = _keeper(settings, start, model, trainable, stages) if settings.keep_best else None
    scores = scores_of(benchmarks, settings, model, processor)
    trainer = make_trainer(settings, args, model, processor, dataset, trainable, held_out, keep, scores)
    if resume is not None:
        _say(f"resuming from {resume}")
    with _fast_paths(model, start.stage, autocast=args.deepspeed is None and (args.bf16 or args.fp16)):
        trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    _end_if_interrupted(trainer)

    tensors = step_checkpoints.gather(trainable, args.should_save)  # every rank takes part
    if args.should_save:
        with _adding(settings.output_dir) as folder:
            _save(settings, start, model, trainable, tensors, stages, folder)
            trainer.state.save_to_json(str(folder / STATE))
        _say(ending(args, trainer.state, _next_stage(settings, trainable)))
    if dist.is_initialized():
        dist.barrier()


def _make_model(settings: Settings, start: Start, seed: int) -> tuple[ToveLlavaForConditionalGeneration, Trainable]:
    """Make the model, and choose what of it trains."""
    model = start.model(seed, settings.device())
    set_compute_dtype(model, settings.compute_dtype() or model.dtype)
    if settings.pretrained is not None:
        _say(f"starts from {settings.pretrained}")
    if start.stage.quantization is not None:
        _say(f"language model in {start.stage.quantization}")
    model.tower.set_execution(settings.stage.tower_execution)
    trainable = freeze(model, start.stage)
    _say(trainable.report(model))
    _set_checkpointing(model, trainable, start.stage)
    return model, trainable


def _end_if_interrupted(trainer: ToveTrainer) -> None:
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if trainer.interrupted:
        saved = Path(trainer.args.output_dir) / f"{CHECKPOINT}{step}"
        again = f"the same command goes on with step {step + 1} of {steps}"
        raise Interrupted(trainer.interrupted, f"saved {saved}; {again}")
    note("training is over; its model is being saved")


def _next_stage(settings: Settings, trainable: Trainable) -> str:
    """Return the command that fine-tunes a model whose language model has not been trained yet."""
    if {LANGUAGE, LORA, ENCODER} & set(trainable.parts) or "finetune_lora" not in settings.preset.stages:
        return ""
    return f"this command with stage finetune_lora, --pretrained {settings.output_dir}, and its own records and folder"


def _set_checkpointing(model: ToveLlavaForConditionalGeneration, trainable: Trainable, stage: StagePreset) -> None:
    budget, language = stage.checkpointing_gib, model.model.language_model
    whole = 0 if budget is None else kept_by_layer(language, trainable, stage.lora)
    set_checkpointing(model, stage.kept, budget_gib=budget, whole=whole)


@contextmanager
def _fast_paths(model: ToveLlavaForConditionalGeneration, stage: StagePreset, autocast: bool) -> Iterator[None]:
    language = model.model.language_model
    with ExitStack() as stack:
        if autocast:
            stack.enter_context(inputs_left_to_autocast(model))
        if stage.padding_free:
            stack.enter_context(packed_rows(language))
        if stage.fused_kernels:
            stack.enter_context(fused_kernels(language))
        yield


def make_trainer(
    settings: Settings,
    args: TrainingArguments,
    model: ToveLlavaForConditionalGeneration,
    processor: LlavaProcessor,
    dataset: LlavaDataset,
    trainable: Trainable,
    held_out: LlavaDataset | None = None,
    keep: Callable[..., None] | None = None,
    benchmarks: Callable[[Path], Mapping[str, float]] | None = None,
) -> ToveTrainer:
    """Make the trainer of a stage; ``keep`` writes the best model, judged by the held-out records."""
    stage, muon = settings.stage, []
    if stage.merge is not None:
        muon = MERGE_OPTIMIZERS.get(stage.merge.optimizer)(cast(MergingTower, model.tower))
    collator = LlavaCollator(
        pad_token_id=processor.tokenizer.pad_token_id,
        image_token_id=processor.image_token_id,
        num_image_tokens=model.config.vision_config.num_image_tokens,
        packed=stage.padding_free,
    )
    return ToveTrainer(
        model,
        args,
        trainable=trainable,
        dataset=dataset,
        collator=collator,
        parameter_groups=parameter_groups(
            trainable,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            projector_learning_rate=stage.projector_learning_rate,
            tower_learning_rate=stage.tower_learning_rate,
            encoder_learning_rate=stage.encoder_learning_rate,
            muon=muon,
        ),
        group_by_modality_length=stage.group_by_modality_length,
        further_images=make_further_images(settings, dataset, model.tower, args.seed),
        validation=None if held_out is None else Validation(Numbered(held_out, None), NumberedCollator(collator), keep),
        benchmarks=benchmarks,
    )


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest complete checkpoint; print which incomplete ones are ignored."""
    for path in incomplete(output_dir):
        _say(f"ignoring {path}: its save was interrupted")
    found = complete(output_dir)
    return found[-1] if found else None


@contextmanager
def _adding(run: Path) -> Iterator[Path]:
    """Yield a folder for the finished model, which moves into the run's; a card that somebody wrote stays."""
    with adding(run, last=MANIFEST) as folder:
        if (run / CARD).is_file():
            shutil.copyfile(run / CARD, folder / CARD)
        yield folder


def _save(
    settings: Settings,
    start: Start,
    model: ToveLlavaForConditionalGeneration,
    trainable: Trainable,
    tensors: dict[str, torch.Tensor],
    stages: list[dict[str, Any]],
    folder: Path,
) -> None:
    kinds = {LORA: "lora", LANGUAGE: "full"}
    processor = build_processor(
        start.processor.tokenizer,
        model.config.vision_config,
        image_token=start.processor.image_token,
        template=settings.stage.template,
        image_aspect_ratio=settings.stage.image_aspect_ratio,
    )
    manifest = Manifest(
        kind=next((kind for part, kind in kinds.items() if part in trainable.parts), "trained"),
        stage=settings.stage_name,
        preset=settings.preset.name,
        template=settings.stage.template,
        image_aspect_ratio=settings.stage.image_aspect_ratio,
        model_max_length=settings.stage.model_max_length,
        language=start.language,
        language_fingerprint=start.language_fingerprint,
        quantization=recorded(start.quantization),
        history=stages,
    )
    save_checkpoint(folder, model, processor, manifest, tensors, self_contained=settings.self_contained)


def _keeper(
    settings: Settings,
    start: Start,
    model: ToveLlavaForConditionalGeneration,
    trainable: Trainable,
    stages: list[dict[str, Any]],
) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    """Return what writes the best model to a folder."""
    return lambda folder, tensors: _save(settings, start, model, trainable, tensors, stages, folder)


def _check_template(settings: Settings) -> None:
    """Refuse a merge that would change a model's conversation template by accident."""
    if settings.stage.merge is None or settings.pretrained is None:
        return
    there, folder = Manifest.read(settings.pretrained), settings.pretrained
    ours = f"the preset {settings.preset.name!r}"
    same = get_template(there.template) is get_template(settings.stage.template)
    if not (same or settings.template_given or there.kind == "trained"):  # after stage 1 a model has no template yet
        raise ConfigError(
            f"{folder} was trained with the conversation template {there.template!r}, and the stage "
            f"{settings.stage_name!r} of {ours} has {settings.stage.template!r}. Merge it with its own preset "
            f"(--preset {there.preset}; for the script PRESET={there.preset}), or say which template is meant: "
            f"--template {there.template}"
        )
    if there.preset != settings.preset.name:
        _say(f"settings of {ours}; {folder} was trained with {there.preset!r}")


def _is_last_step(checkpoint: Path) -> bool:
    state = read_json_object(checkpoint / STATE, finite=False)  # transformers logs NaN too
    return state["global_step"] >= state["max_steps"]


def _keep_deepspeed_from_compiling() -> None:
    """Keep DeepSpeed from compiling a shared-memory kernel on the CPU.

    Compiling takes a minute and fails without a compiler. Without the kernel DeepSpeed uses gloo, which is as good for
    a few ranks.
    """
    if "WORLD_SIZE" in os.environ and importlib.util.find_spec("deepspeed") and not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _use_master_weights(args: TrainingArguments, trainable: Trainable) -> None:
    """Make trainable parameters float32; DeepSpeed keeps such copies itself."""
    if args.deepspeed is None:
        for parameter in trainable.parameters():
            parameter.data = parameter.data.float()


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _say(text: str) -> None:
    if _is_main():
        print(text, flush=True)


def main(
    argv: Sequence[str] | None = None, command: str = "train", make_benchmarks: MakeBenchmarks | None = None
) -> int:
    """Run the command line; return 0, 2 for bad input, or 128 and a signal's number."""
    quiet_transformers()
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        with watching():
            arguments = take_plugin_flags(arguments)
            if {"-h", "--help"} & set(arguments):
                _say(help_page())
            elif "--help-all" in arguments:
                _say(help_page(further_flags()))
            elif "--meta" in arguments:
                _say(print_sizes(arguments))
            elif {"--print-config", "--print_config"} & set(arguments):
                _say(print_config(arguments).rstrip())
            else:
                settings = parse(arguments)
                command = "merge" if settings.stage.merge is not None else command
                run(settings, make_benchmarks)
        return 0
    except ToveError as error:
        # Before communication starts, all ranks meet the same error. Later one rank may fail by itself.
        if _is_main() or dist.is_initialized():
            rank = f" (rank {os.environ['RANK']})" if dist.is_initialized() and not _is_main() else ""
            print(f"tove-llava {command}{rank}: {error}", file=sys.stderr, flush=True)
        return 2
    except Interrupted as end:
        if _is_main():
            print(f"tove-llava {command}: {end}", file=sys.stderr, flush=True)
        return end.code


def run_as_process(argv: Sequence[str] | None = None, make_benchmarks: MakeBenchmarks | None = None) -> int:
    """Run :func:`main`; after success wait for all ranks and disconnect."""
    code = main(argv, make_benchmarks=make_benchmarks)
    if code == 0 and dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    end_with_launcher()
    sys.exit(run_as_process())
