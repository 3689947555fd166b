"""A training run, from its settings to a saved checkpoint; ``python -m tove_llava.train.run --help`` has the flags."""

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import LlavaProcessor, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tove_llava.checkpoints.manifest import MANIFEST, Manifest
from tove_llava.checkpoints.saving import save_checkpoint
from tove_llava.core.errors import CheckpointError, ConfigError, ToveError
from tove_llava.core.files import read_json_object
from tove_llava.core.logs import quiet_transformers
from tove_llava.data import ImageTransform, LlavaCollator, LlavaDataset, get_template
from tove_llava.data.images import AspectRatio
from tove_llava.data.resize import ImageResize
from tove_llava.llava.adapters import inputs_left_to_autocast
from tove_llava.llava.build import torch_dtype
from tove_llava.llava.kernels import check_kernels, fused_kernels
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration
from tove_llava.llava.processing import build_processor
from tove_llava.llava.quantization import recorded, set_compute_dtype
from tove_llava.llava.varlen import packed_rows
from tove_llava.presets import StagePreset, load_preset
from tove_llava.tower import ToveVisionConfig
from tove_llava.train import step_checkpoints as checkpoints
from tove_llava.train.arguments import Parser, parse
from tove_llava.train.features import FeatureCache
from tove_llava.train.merging import FurtherImages, MergingTower, Pictures
from tove_llava.train.optimizer import MERGE_OPTIMIZERS
from tove_llava.train.recomputation import set_checkpointing
from tove_llava.train.settings import Settings
from tove_llava.train.shapes import kept_by_layer
from tove_llava.train.stages import LANGUAGE, LORA, Trainable, freeze, parameter_groups
from tove_llava.train.start import Start, make_start
from tove_llava.train.trainer import ToveTrainer

RUN_RECORD = "run.json"
STATE = "trainer_state.json"


def run(settings: Settings) -> None:
    """Trains one stage and saves its checkpoint into ``settings.output_dir``.

    Interrupted, the same settings resume from the last complete checkpoint. Finished, they do nothing.

    Raises:
        ToveError: a setting, record, image or checkpoint is unusable, or the loss is not finite.
    """
    record = _run_record(settings)
    if is_finished(settings.output_dir, record):
        _say(f"{settings.output_dir} holds this run already, finished; nothing to do. Remove the folder to train again")
        return
    _check_deepspeed(settings)
    _check_template(settings)
    if settings.stage.fused_kernels:
        check_kernels(settings.device())
    unset_hf_deepspeed_config()  # of an earlier run in this process; the model is built as if DeepSpeed were not there
    seed = settings.training.get("seed", 42)
    set_seed(seed)
    start = make_start(settings.preset, settings.stage, settings.pretrained)
    processor = start.processor
    dataset = make_dataset(settings, processor, start.vision)
    _say(f"data: {dataset.report}")
    history = _history(settings, len(dataset))

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

    resume = last_checkpoint(settings.output_dir)
    _write_record(settings.output_dir, record)
    if resume is not None and _is_last_step(resume):
        _say(f"{resume} is the last step of this run; only saving was left to do")
        checkpoints.load_weights(resume / checkpoints.WEIGHTS, trainable)
        if _is_main():
            state = (resume / STATE).read_text()
            _save(settings, start, model, trainable, checkpoints.gather(trainable, True), history)
            (settings.output_dir / STATE).write_text(state)
        return

    # From here on DeepSpeed is configured: under ZeRO-3 a model built later would be partitioned while it is built.
    _keep_deepspeed_from_compiling()
    args = settings.training_arguments()
    _use_master_weights(args, trainable)
    trainer = make_trainer(settings, args, model, processor, dataset, trainable)
    if resume is not None:
        _say(f"resuming from {resume}")
    with _fast_paths(model, start.stage, autocast=args.deepspeed is None and (args.bf16 or args.fp16)):
        trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)

    tensors = checkpoints.gather(trainable, args.should_save)  # every rank takes part
    if args.should_save:
        trainer.save_state()
        _save(settings, start, model, trainable, tensors, history)
        final = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
        ending = f", last lm_loss {final[-1]['lm_loss']:.6f}" if final else ""
        _say(f"saved {settings.output_dir} after {trainer.state.global_step} steps{ending}")
    if dist.is_initialized():
        dist.barrier()


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


def make_dataset(settings: Settings, processor: LlavaProcessor, vision: ToveVisionConfig) -> LlavaDataset:
    """The stage's records, checked."""
    transform = ImageTransform(
        vision.image_size,
        cast(AspectRatio, settings.stage.image_aspect_ratio),
        mean=vision.image_mean,
        std=vision.image_std,
        image_resize=cast(ImageResize, settings.stage.image_resize),
    )
    cache = None
    if settings.feature_cache is not None:
        cache = _open_cache(settings, settings.feature_cache, vision, settings.image_folder)
    return LlavaDataset(
        settings.data_path,
        settings.image_folder,
        processor.tokenizer,
        settings.stage.template,
        transform,
        num_image_tokens=vision.num_image_tokens,
        model_max_length=settings.stage.model_max_length,
        allow_image_links=settings.allow_image_links,
        features=cache,
        read_pixels=cache is None or settings.stage.merge is not None,  # a student sees the pictures themselves
    )


def _open_cache(settings: Settings, folder: Path, vision: ToveVisionConfig, images: Path) -> FeatureCache:
    dtype = settings.compute_dtype() or torch_dtype(settings.preset.language.dtype)
    return FeatureCache(folder, vision, settings.stage.image_aspect_ratio, images, dtype)


def make_further_images(settings: Settings, dataset: LlavaDataset, tower: Any, seed: int) -> FurtherImages | None:
    """Images for the merge loss alone, where the stage wants some."""
    merge = settings.stage.merge
    if merge is None or merge.images_per_record == 0:
        return None
    cache = None
    if settings.merge_feature_cache is not None:
        vision, folder = tower.teacher.config, settings.merge_image_folder
        cache = _open_cache(settings, settings.merge_feature_cache, vision, folder)
    pictures = Pictures(
        settings.merge_data_path,
        settings.merge_image_folder,
        dataset.image_transform,
        cache,
        settings.allow_image_links,
    )
    return FurtherImages(pictures, merge.images_per_record, seed)


def make_trainer(
    settings: Settings,
    args: TrainingArguments,
    model: ToveLlavaForConditionalGeneration,
    processor: LlavaProcessor,
    dataset: LlavaDataset,
    trainable: Trainable,
) -> ToveTrainer:
    """The trainer of a stage."""
    stage = settings.stage
    return ToveTrainer(
        model,
        args,
        trainable=trainable,
        dataset=dataset,
        collator=LlavaCollator(
            pad_token_id=processor.tokenizer.pad_token_id,
            image_token_id=processor.image_token_id,
            num_image_tokens=model.config.vision_config.num_image_tokens,
            packed=stage.padding_free,
        ),
        parameter_groups=parameter_groups(
            trainable,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            projector_learning_rate=stage.projector_learning_rate,
            tower_learning_rate=stage.tower_learning_rate,
            encoder_learning_rate=stage.encoder_learning_rate,
            muon=()
            if stage.merge is None
            else MERGE_OPTIMIZERS.get(stage.merge.optimizer)(cast(MergingTower, model.tower)),
        ),
        group_by_modality_length=stage.group_by_modality_length,
        further_images=make_further_images(settings, dataset, model.tower, args.seed),
    )


def is_finished(output_dir: Path, record: dict[str, Any]) -> bool:
    """Whether a folder holds the finished run of these settings.

    Raises:
        CheckpointError: it holds a run of other settings; the message names the keys that differ.
    """
    file = output_dir / RUN_RECORD
    finished = (output_dir / MANIFEST).is_file()
    if not file.is_file():
        if finished or checkpoints.complete(output_dir):
            raise CheckpointError(f"{output_dir} holds a model but no {RUN_RECORD}; choose another --output_dir")
        return False
    old = read_json_object(file)
    new = json.loads(json.dumps(record))
    if finished or not checkpoints.complete(output_dir):  # nothing to resume: the number of processes is free
        old, new = ({k: v for k, v in r.items() if k != "world_size"} for r in (old, new))
    keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))  # a new setting's None is no change
    if keys and (finished or checkpoints.complete(output_dir)):
        shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in keys)
        raise CheckpointError(
            f"{output_dir} holds a run with other settings ({shown}). Choose another --output_dir, remove that folder, "
            "or give the settings it was started with"
        )
    return finished


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint; says which incomplete ones are ignored."""
    for path in checkpoints.incomplete(output_dir):
        _say(f"ignoring {path}: its save was interrupted")
    found = checkpoints.complete(output_dir)
    return found[-1] if found else None


def _save(
    settings: Settings,
    start: Start,
    model: ToveLlavaForConditionalGeneration,
    trainable: Trainable,
    tensors: dict[str, torch.Tensor],
    history: list[dict[str, Any]],
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
        history=history,
    )
    save_checkpoint(settings.output_dir, model, processor, manifest, tensors, self_contained=settings.self_contained)


def _check_deepspeed(settings: Settings) -> None:
    """Refuses what a DeepSpeed configuration cannot do: Muon, and ZeRO-3 over packed, quantised weights."""
    file = settings.deepspeed_file()
    stage = settings.stage
    if file is None:
        return
    if stage.merge is not None and stage.merge.optimizer != "adamw":
        raise ConfigError(
            f"merge optimizer {stage.merge.optimizer!r} needs whole matrices, which DeepSpeed cuts up; give "
            "--deepspeed none (DEEPSPEED_CONFIG=none), or --merge_optimizer adamw"
        )
    zero = read_json_object(file, ConfigError, "check --deepspeed").get("zero_optimization", {})
    if stage.quantization is not None and zero.get("stage") == 3:
        raise ConfigError(
            f"a language model in {stage.quantization} does not run under ZeRO-3; give --deepspeed zero2 "
            "(DEEPSPEED_CONFIG=zero2)"
        )


def _check_template(settings: Settings) -> None:
    """Refuses a merge that would teach a model another conversation template unasked; stage 1's model has none yet."""
    if settings.stage.merge is None or settings.pretrained is None:
        return
    there, folder = Manifest.read(settings.pretrained), settings.pretrained
    ours = f"the preset {settings.preset.name!r}"
    same = get_template(there.template) is get_template(settings.stage.template)
    if not (same or settings.template_given or there.kind == "trained"):
        raise ConfigError(
            f"{folder} was trained with the conversation template {there.template!r}, and the stage "
            f"{settings.stage_name!r} of {ours} has {settings.stage.template!r}. Merge it with its own preset "
            f"(--preset {there.preset}; for the script PRESET={there.preset}), or say which template is meant: "
            f"--template {there.template}"
        )
    if there.preset != settings.preset.name:
        _say(f"settings of {ours}; {folder} was trained with {there.preset!r}")


def _run_record(settings: Settings) -> dict[str, Any]:
    record = settings.record()
    record["deepspeed"] = Path(settings.deepspeed_file() or "none").stem
    record["world_size"] = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.pretrained is not None:
        record["pretrained_fingerprint"] = Manifest.read(settings.pretrained).fingerprint
    return record


# What a model card tells of a stage, beside its data: name there -> key of the run's record.
_TOLD = {
    "trains": "settings.train",
    "template": "settings.template",
    "pictures": "settings.image_aspect_ratio",
    "epochs": "arguments.num_train_epochs",
    "steps at most": "arguments.max_steps",
    "learning rate": "arguments.learning_rate",
    "learning rate, projector": "settings.projector_learning_rate",
    "learning rate, tower": "settings.tower_learning_rate",
    "schedule": "arguments.lr_scheduler_type",
    "warm-up": "arguments.warmup_steps",
    "weight decay": "arguments.weight_decay",
    "batch per process": "arguments.per_device_train_batch_size",
    "gradient accumulation": "arguments.gradient_accumulation_steps",
    "processes": "world_size",
    "DeepSpeed": "deepspeed",
    "LoRA rank": "settings.lora.r",
    "LoRA alpha": "settings.lora.alpha",
    "balance loss": "vision.router_aux_loss_coef",
    "seed": "arguments.seed",
}


def _history(settings: Settings, records: int) -> list[dict[str, Any]]:
    """Data and recipe of this stage behind those of the stages that it starts from. No path of this machine."""
    record = _run_record(settings)
    earlier = Manifest.read(settings.pretrained).history if settings.pretrained is not None else []
    told = {name: record[key] for name, key in _TOLD.items() if record.get(key) is not None}
    return [*earlier, {"stage": settings.stage_name, "data": settings.data_path.name, "records": records, **told}]


def _write_record(output_dir: Path, record: dict[str, Any]) -> None:
    if _is_main():
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / RUN_RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _is_last_step(checkpoint: Path) -> bool:
    state = read_json_object(checkpoint / STATE)
    return state["global_step"] >= state["max_steps"]


def _keep_deepspeed_from_compiling() -> None:
    """On the CPU DeepSpeed compiles a shared-memory kernel when it starts: a minute, and a failure without a compiler.

    Its table of usable kernels may be edited; without this one it uses gloo, which is as good for a few ranks.
    """
    if "WORLD_SIZE" in os.environ and importlib.util.find_spec("deepspeed") and not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _use_master_weights(args: TrainingArguments, trainable: Trainable) -> None:
    """Without DeepSpeed, which keeps its own float32 copies, what trains is float32 and autocast does the rest."""
    if args.deepspeed is None:
        for parameter in trainable.parameters():
            parameter.data = parameter.data.float()


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _say(text: str) -> None:
    if _is_main():
        print(text, flush=True)


def print_sizes(argv: Sequence[str]) -> None:
    """``--meta``: the preset's parameters and GFLOPs at its true size; no weights, no data, no training."""
    from tove_llava.llava.sizes import format_sizes, preset_sizes

    given = Parser().given([word for word in argv if word != "--meta"])
    print(format_sizes(preset_sizes(load_preset(given.get("preset", "tiny"), given["set"]))))


def main(argv: Sequence[str] | None = None, command: str = "train") -> int:
    """The command line: 0 when the run is finished, 2 for bad input. ``command`` heads messages."""
    quiet_transformers()
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        if "--meta" in arguments:
            print_sizes(arguments)
        else:
            settings = parse(arguments)
            command = "merge" if settings.stage.merge is not None else command
            run(settings)
        return 0
    except ToveError as error:
        # Errors that all ranks meet alike are told once; after the start of communication a rank may be alone with one.
        if _is_main() or dist.is_initialized():
            rank = f" (rank {os.environ['RANK']})" if dist.is_initialized() and not _is_main() else ""
            print(f"tove-llava {command}{rank}: {error}", file=sys.stderr, flush=True)
        return 2


def run_as_process(argv: Sequence[str] | None = None) -> int:
    """:func:`main`, and after a success the end of the ranks' communication: none goes while another still listens."""
    code = main(argv)
    if code == 0 and dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(run_as_process())
