"""Define the flags of a run and write their help, without torch and transformers.

The flags are those of :class:`RunArguments`, of the preset's stage (every field with a help text), and of
``transformers.TrainingArguments``, of which :data:`COMMON` lists the usual ones.
"""

import argparse
import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from tove_llava.core.errors import ConfigError
from tove_llava.core.registry import closest
from tove_llava.presets import LoraPreset, MergePreset, QuantizationPreset, StagePreset

PROGRAM = "tove-llava train"
USAGE = f"{PROGRAM} [--preset NAME] [--stage NAME] [--set key.path=value] [any flag below]"
ABOUT = """Train one stage of a preset, or go on with a run that was interrupted.

A flag that is not given has the preset's value: tove-llava presets show NAME --stage STAGE"""


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class RunArguments:
    """Flags of the run itself: preset, stage, data, start and saving."""

    preset: str = _flag("tiny", "name of a preset or path of a .yaml file (default: tiny)")
    stage: str = _flag("pretrain", "stage of the preset (default: pretrain)")
    data_path: str | None = _flag(None, "records; a.jsonl,b.parquet:0.5 mixes two files by weight")
    image_folder: str | None = _flag(None, "folder that image paths start from")
    pretrained: str | None = _flag(None, "folder of the stage that this one starts from")
    merge_data_path: str | None = _flag(None, "records that name the further images (default: --data_path)")
    merge_image_folder: str | None = _flag(None, "folder of the further images (default: --image_folder)")
    merge_feature_cache: str | None = _flag(
        None, "cache of their features (default without --merge_data_path: --feature_cache)"
    )
    merge_lora_r: int | None = _flag(None, "merge into adapters of this rank; 0 merges into the encoder's own weights")
    feature_cache: str | None = _flag(None, "folder that 'tove-llava features' made; then no encoder runs")
    eval_data_path: str | None = _flag(None, "held-out records, whose loss is measured while the run trains")
    eval_image_folder: str | None = _flag(None, "folder of their images (default: --image_folder)")
    eval_benchmarks: str | None = _flag(None, "benchmarks that the model answers while it trains: scenes,pope")
    eval_benchmarks_limit: int = _flag(100, "questions of each, evenly spread (default: 100)")
    eval_data_root: str | None = _flag(None, "folder of their data (default: as tove-llava eval finds it)")
    keep_best: bool = _flag(True, "keep the model with the lowest such loss in OUTPUT_DIR/best")
    allow_image_links: bool = _flag(False, "follow links that lead out of the image folder")
    self_contained: bool = _flag(False, "save frozen parts by value instead of by reference")


# Classes whose fields are flags, and what the flags begin with: --lora_r is LoraPreset.r.
_PREFIXES: dict[type, str] = {StagePreset: "", MergePreset: "merge_", LoraPreset: "lora_", QuantizationPreset: ""}


def _flags_of(kind: type) -> dict[str, Any]:
    return {_PREFIXES[kind] + f.name: f for f in dataclasses.fields(kind) if "help" in f.metadata}


def given_for(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a settings class that flags give."""
    return {f.name: given[flag] for flag, f in _flags_of(kind).items() if given.get(flag) is not None}


StageFlags = dataclasses.make_dataclass(
    "StageFlags",
    [
        (flag, f.type | None, field(default=None, metadata=f.metadata))
        for kind in _PREFIXES
        for flag, f in _flags_of(kind).items()
    ],
)

SWITCHES = {
    "print_config": "print the run's settings as a preset, and its steps, memory and time; train nothing",
    "meta": "print the preset's parameters and GFLOPs, train nothing",
    "help": "show this page",
    "help_all": "show the other flags of transformers.TrainingArguments too",
}

# --set, --plugin, and transformers' flags that most runs need: the value's name and our own help.
COMMON = {
    "set": ("key.path=value", "override a key of the preset; may be repeated"),
    "plugin": ("FILE.py", "load parts of your own; may be repeated"),
    "output_dir": ("DIR", "folder that the run writes; the same command resumes what is in it"),
    "num_train_epochs": ("X", "passes over the records"),
    "max_steps": ("N", "optimizer steps, instead of epochs"),
    "per_device_train_batch_size": ("N", "records of a micro-batch on each device"),
    "gradient_accumulation_steps": ("N", "micro-batches of an optimizer step"),
    "seed": ("N", "seed of weights, order, dropout and noise"),
    "learning_rate": ("X", "the stage's learning rate"),
    "lr_scheduler_type": ("NAME", "linear, cosine, constant, constant_with_warmup, ..."),
    "warmup_steps": ("X", "steps of the warm-up, or its share of all steps if below 1"),
    "weight_decay": ("X", "weight decay of AdamW"),
    "max_grad_norm": ("X", "clip the gradient to this norm; 0 clips nothing"),
    "optim": ("NAME", "optimizer, such as adamw_torch or adamw_torch_fused"),
    "bf16": ("BOOL", "mixed precision in bfloat16"),
    "fp16": ("BOOL", "mixed precision in float16"),
    "tf32": ("BOOL", "matrix products in TF32 (Ampere and later)"),
    "use_cpu": ("BOOL", "train on the CPU although there is a GPU"),
    "deepspeed": ("NAME", "zero2, zero3, zero3_offload, none, or a .json file; under a launcher only"),
    "dataloader_num_workers": ("N", "processes that read and prepare images"),
    "eval_steps": ("N", "steps between two measurements (default: one after each epoch)"),
    "per_device_eval_batch_size": ("N", "held-out records, or questions, of a batch on each device"),
    "logging_steps": ("N", "steps between two lines of the log"),
    "report_to": ("NAME", "tensorboard, wandb, trackio, ..., or none"),
    "run_name": ("NAME", "the run's name in these"),
    "save_steps": ("N", "steps between two checkpoints to resume from"),
    "save_total_limit": ("N", "checkpoints to keep"),
}

GROUPS = {
    "run": "preset stage set plugin output_dir print_config meta help help_all",
    "data": "data_path image_folder allow_image_links template image_placeholder image_aspect_ratio image_resize "
    "model_max_length group_by_modality_length dataloader_num_workers",
    "start and length": "pretrained num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps seed",
    "learning rates": "learning_rate projector_learning_rate tower_learning_rate encoder_learning_rate "
    "lr_scheduler_type warmup_steps weight_decay max_grad_norm optim",
    "LoRA and quantisation": "lora_r lora_alpha lora_dropout bits quant_type double_quant",
    "merge": "merge_loss merge_coefficient merge_layers merge_lora_r merge_optimizer merge_token_weights "
    "merge_images_per_record merge_data_path merge_image_folder merge_feature_cache",
    "memory and speed": "bf16 fp16 tf32 use_cpu deepspeed padding_free checkpointing checkpointing_gib fused_kernels "
    "tower_execution feature_cache",
    "validation": "eval_data_path eval_image_folder keep_best eval_benchmarks eval_benchmarks_limit "
    "eval_data_root eval_steps per_device_eval_batch_size",
    "logging and saving": "logging_steps report_to run_name save_steps save_total_limit self_contained",
}

# What people type instead of a flag (or of something else that they look for).
_TYPED = {
    "--learning_rate": "lr learningrate base_lr",
    "--projector_learning_rate": "projector_lr mm_projector_lr",
    "--tower_learning_rate": "tower_lr gate_lr",
    "--encoder_learning_rate": "encoder_lr mm_vision_tower_lr",
    "--lr_scheduler_type": "scheduler lr_scheduler lr_schedule",
    "--warmup_steps": "warmup warmup_ratio",
    "--weight_decay": "wd",
    "--optim": "optimizer",
    "--max_grad_norm": "grad_clip gradient_clipping clip_grad_norm",
    "--per_device_train_batch_size": "bs batch batchsize batch_size train_batch_size "
    "micro_batch_size per_device_batch_size",
    "--gradient_accumulation_steps": "grad_accum grad_accumulation gradient_accumulation accumulation_steps accum",
    "--num_train_epochs": "epoch epochs num_epochs",
    "--max_steps": "steps num_steps train_steps max_iters",
    "--data_path": "data dataset data_file",
    "--image_folder": "images image_dir image_root image_path",
    "--output_dir": "out output out_dir",
    "--preset": "config",
    "--pretrained": "model model_path checkpoint pretrain_mm_mlp_adapter",
    "--template": "version conv_mode",
    "--dataloader_num_workers": "workers num_workers",
    "--model_max_length": "max_length max_seq_length seq_len",
    "--lora_r": "lora_rank rank",
    "--bits 4": "load_4bit load_in_4bit",
    "--bits 8": "load_8bit load_in_8bit",
    "--checkpointing": "grad_checkpointing",
    "--deepspeed": "zero zero_stage",
    "--report_to wandb": "wandb",
    "--report_to tensorboard": "tensorboard",
    "--logging_steps": "log_steps log_every",
    "--save_steps": "save_every",
    "--stage finetune_lora": "lora lora_enable",
    "--set language.source=NAME": "model_name_or_path llm",
    "--set vision.clip=NAME": "vision_tower",
    "--set vision.clip_layer=N": "mm_vision_select_layer",
    "--set vision.experts=[...]": "experts",
    "--set vision.fusion=NAME": "fusion",
    "--set vision.top_k=N": "top_k",
    "the same command again (it resumes)": "resume",
}
MEANT = {typed: flag for flag, words in _TYPED.items() for typed in words.split()}


def own_flags() -> dict[str, Any]:
    """Return the flags that are not transformers', with their fields."""
    return {f.name: f for kind in (RunArguments, StageFlags) for f in dataclasses.fields(kind)}


def suggestion(flag: str, further: Iterable[str] = ()) -> str:
    """Write " Did you mean ...?" for an unknown flag, or how all flags are listed.

    Args:
        further: flags that the help page leaves out.
    """
    meant = MEANT.get(_plain(flag))
    if meant is not None:
        return f" Did you mean {meant!r}?"
    near = closest(f"--{_plain(flag)}", [f"--{name}" for name in (*own_flags(), *COMMON, *SWITCHES, *further)])
    return near or f" '{PROGRAM} --help' lists the flags, --help-all also transformers' own"


def refuse_mistyped(argv: Iterable[str]) -> None:
    """Refuse the flags of :data:`MEANT`, before anything heavy is imported.

    Raises:
        ConfigError: a word is such a flag.
    """
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and _plain(flag) in MEANT:
            raise ConfigError(f"unknown flag {flag!r}.{suggestion(flag)}")


def help_page(further: Mapping[str, Any] | None = None) -> str:
    """Write the help, with every flag in its group.

    Args:
        further: fields of other flags, for a last group.
    """
    width = shutil.get_terminal_size((120, 40)).columns
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description=ABOUT,
        add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=width),
    )
    own, hints = own_flags(), get_type_hints(RunArguments) | get_type_hints(StageFlags)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names.split():
            if name in SWITCHES:
                group.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=SWITCHES[name])
                continue
            metavar, text = COMMON.get(name) or (_metavar(name, hints[name]), own[name].metadata["help"])
            group.add_argument(f"--{name}", metavar=metavar, help=text)
    if further:
        group = parser.add_argument_group("transformers' other flags (transformers.TrainingArguments)")
        for name, f in further.items():
            text = " ".join(str(f.metadata.get("help", "")).split()).replace("%", "%%")
            group.add_argument(f"--{name}", metavar="VALUE", help=text)
    return parser.format_help()


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_").lower()


def _metavar(name: str, hint: Any) -> str:
    kinds = get_args(hint) or (hint,)
    for kind, shown in ((bool, "BOOL"), (int, "N"), (float, "X")):
        if kind in kinds:
            return shown
    if any(get_args(kind) for kind in kinds):
        return "N..."
    if name.endswith(("folder", "cache", "pretrained", "root")):
        return "DIR"
    return "FILE" if name.endswith("data_path") else "NAME"
