"""A run's settings: a preset's stage, overridden by command-line flags.

``transformers.TrainingArguments`` is not built here but by :meth:`Settings.training_arguments`, because building it
starts DeepSpeed's configuration, and under ZeRO-3 with bf16 the model has to exist before that.
"""

import argparse
import dataclasses
import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from tove_llava.core.errors import ConfigError
from tove_llava.presets import LoraPreset, Preset, QuantizationPreset, StagePreset, load_preset
from tove_llava.tower.execution import execution_mode
from tove_llava.train.recomputation import FULL, NONE, SELECTIVE, check_kind

CONFIG_FOLDER = Path(__file__).parent / "deepspeed"

# Settings that change neither the data nor the weights: a run may be continued with other values of them.
OPERATIONAL = frozenset(
    {
        "output_dir", "logging_steps", "logging_dir", "logging_first_step", "logging_strategy", "save_steps",
        "report_to", "save_strategy", "save_total_limit", "disable_tqdm", "dataloader_num_workers",
        "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers", "run_name",
        "log_level", "log_level_replica", "ddp_timeout", "project", "include_num_input_tokens_seen",
    }
)  # fmt: skip


_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # older and newer transformers' name

_SCENES = (
    ". Give your own, or make the playground's: tove-llava scenes --out playground/data/scenes --train 8000 --val 300"
)
_HINTS = {
    "--data_path": _SCENES,
    "--image_folder": _SCENES,
    "--feature_cache": ". Make it first: tove-llava features --help",
    "--pretrained": ". Run stage 1 first (bash scripts/pretrain.sh), or name its folder",
}


@dataclass
class RunArguments:
    """The flags that are not ``transformers.TrainingArguments``; ``None`` keeps the preset's value."""

    preset: str = field(default="tiny", metadata={"help": "name of a preset or path of a .yaml file"})
    stage: str = field(default="pretrain", metadata={"help": "stage of the preset"})
    data_path: str | None = field(default=None, metadata={"help": "LLaVA records, .json or .jsonl"})
    image_folder: str | None = field(default=None, metadata={"help": "folder that image paths start from"})
    pretrained: str | None = field(default=None, metadata={"help": "folder of the stage that this one starts from"})
    template: str | None = field(default=None, metadata={"help": "conversation template"})
    image_aspect_ratio: str | None = field(default=None, metadata={"help": "'square' or 'pad'"})
    image_resize: str | None = field(
        default=None, metadata={"help": "'pillow', or 'torch': faster, within 2 of 255 levels"}
    )
    group_by_modality_length: bool | None = field(default=None, metadata={"help": "LLaVA's grouped sampling"})
    model_max_length: int | None = field(default=None, metadata={"help": "longest sequence, image tokens included"})
    padding_free: bool | None = field(
        default=None, metadata={"help": "the sequences of a batch in one row, with no padding between them"}
    )
    tower_execution: str | None = field(
        default=None,
        metadata={"help": "how CLIP and the experts are run: eager, concurrent (side by side), or compiled as well"},
    )
    fused_kernels: bool | None = field(
        default=None, metadata={"help": "liger-kernel's norms, rotary positions and MLP in the language model (CUDA)"}
    )
    checkpointing: str | None = field(
        default=None, metadata={"help": "what the layers compute again in the backward pass: none, full, selective"}
    )
    checkpointing_gib: float | None = field(
        default=None, metadata={"help": "of selective: GiB that the layers' activations may take (default: no limit)"}
    )
    projector_learning_rate: float | None = field(default=None, metadata={"help": "of the projector alone"})
    tower_learning_rate: float | None = field(default=None, metadata={"help": "of the gate and projections alone"})
    encoder_learning_rate: float | None = field(default=None, metadata={"help": "of the merged encoder alone"})
    merge_loss: str | None = field(default=None, metadata={"help": "mse, smooth_l1 or cosine"})
    merge_coefficient: float | None = field(default=None, metadata={"help": "weight of the merge loss"})
    merge_images_per_record: int | None = field(
        default=None,
        metadata={"help": "further images that each record brings, for the merge loss alone"},
    )
    merge_data_path: str | None = field(
        default=None, metadata={"help": "records that name the further images (default: --data_path)"}
    )
    merge_image_folder: str | None = field(
        default=None, metadata={"help": "folder of the further images (default: --image_folder)"}
    )
    merge_feature_cache: str | None = field(
        default=None, metadata={"help": "their features; without --merge_data_path, --feature_cache"}
    )
    merge_optimizer: str | None = field(
        default=None, metadata={"help": "of the encoder's matrices: adamw, or muon (not under DeepSpeed)"}
    )
    merge_token_weights: str | None = field(default=None, metadata={"help": "uniform, or transfer"})
    merge_layers: list[int] | None = field(
        default=None, metadata={"help": "blocks of CLIP that learn, such as 8 9 10; all without it", "nargs": "+"}
    )
    merge_lora_r: int | None = field(
        default=None, metadata={"help": "merge into adapters of this rank; 0 merges into the encoder's own weights"}
    )
    lora_r: int | None = field(default=None, metadata={"help": "rank of the adapters"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scale of the adapters"})
    lora_dropout: float | None = field(default=None, metadata={"help": "dropout in front of the adapters"})
    bits: int | None = field(
        default=None, metadata={"help": "bits of the language model's frozen weights: 4, 8, or 16 (not quantised)"}
    )
    quant_type: str | None = field(default=None, metadata={"help": "of 4 bits: nf4 or fp4"})
    double_quant: bool | None = field(default=None, metadata={"help": "of 4 bits: quantise the scales as well"})
    feature_cache: str | None = field(
        default=None, metadata={"help": "folder that 'tove-llava features' made; no encoder is run then"}
    )
    allow_image_links: bool = field(default=False, metadata={"help": "follow links that lead out of the image folder"})
    self_contained: bool = field(default=False, metadata={"help": "save frozen parts by value instead of by reference"})


@dataclass(frozen=True)
class Settings:
    """Everything that a run is told."""

    preset: Preset
    stage_name: str
    stage: StagePreset
    data_path: Path
    image_folder: Path
    output_dir: Path
    pretrained: Path | None
    self_contained: bool
    allow_image_links: bool
    feature_cache: Path | None
    merge_data_path: Path
    merge_image_folder: Path
    merge_feature_cache: Path | None
    template_given: bool  # by a flag, not by the preset
    training: dict[str, Any]  # TrainingArguments that the preset or a flag gives

    def training_arguments(self) -> TrainingArguments:
        """Builds ``TrainingArguments``; call it after the model exists.

        Raises:
            ConfigError: a value is refused by transformers.
        """
        on_cpu = bool(self.training.get("use_cpu")) or not _has_accelerator()
        pinned = self.training.get("dataloader_pin_memory", not on_cpu)
        fixed = {
            "remove_unused_columns": False,
            "logging_nan_inf_filter": False,  # a loss that is not finite stops the run instead of being averaged away
            "ddp_find_unused_parameters": True,  # a text-only step leaves the tower unused
            "use_cpu": on_cpu,
            "dataloader_pin_memory": pinned,
            "accelerator_config": {"non_blocking": pinned},  # a batch is copied while the step before it runs
        }
        deepspeed = resolve_deepspeed(self.training.get("deepspeed", self.stage.deepspeed))
        # Set on the model itself, see tove_llava.train.recomputation.
        given = {key: value for key, value in self.training.items() if key not in ("deepspeed", *_CHECKPOINTING)}
        try:
            return TrainingArguments(**{**fixed, **given, "output_dir": str(self.output_dir), "deepspeed": deepspeed})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"training arguments: {error}") from error

    @property
    def checkpointing(self) -> str:
        """``none``, ``full`` or ``selective`` (:mod:`tove_llava.train.recomputation`)."""
        return self.stage.kept

    def device(self) -> torch.device:
        """Where this process trains."""
        if self.training.get("use_cpu") or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def compute_dtype(self) -> torch.dtype | None:
        """Of mixed precision, where the run uses it."""
        names = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return next((dtype for name, dtype in names.items() if self.training.get(name)), None)

    def record(self) -> dict[str, Any]:
        """What decides the outcome of the run, as flat plain data: runs with equal records may continue each other."""
        preset = self.preset.to_dict()
        # What is computed once more changes nothing, and a run from before a setting was there may be continued.
        stage = {
            k: v for k, v in dataclasses.asdict(self.stage).items() if k not in ("checkpointing", "checkpointing_gib")
        }
        stage["fused_kernels"] = stage["fused_kernels"] or None
        stage["image_resize"] = None if stage["image_resize"] == "pillow" else stage["image_resize"]
        arguments = {**stage.pop("arguments"), **self.training}
        del stage["tower_execution"]  # the same results, up to rounding
        parts = {
            "preset": preset["name"],
            "stage": self.stage_name,
            "vision": preset["vision"],
            "language": preset["language"],
            "projector": preset["projector"],
            "settings": stage,
            "arguments": {key: value for key, value in arguments.items() if key not in OPERATIONAL},
            "data_path": str(self.data_path.resolve()),
            "data_bytes": self.data_path.stat().st_size,
            "image_folder": str(self.image_folder.resolve()),
            "pretrained": str(self.pretrained.resolve()) if self.pretrained else None,
            "merge_data_path": str(self.merge_data_path.resolve()) if self.stage.merge else None,
        }
        return dict(_flatten(parts))


class Parser(HfArgumentParser):
    """Refuses abbreviations, and turns argparse's exits into :class:`ConfigError` with near matches."""

    def __init__(self) -> None:
        super().__init__(
            [RunArguments, TrainingArguments],
            prog="tove-llava train",
            usage="tove-llava train [--preset NAME] [--stage NAME] [--set key.path=value] [--meta] [any flag below]",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument(
            "--set", action="append", default=[], metavar="key.path=value", help="override a preset's key"
        )
        self.add_argument("--meta", action="store_true", help="print the preset's parameters and GFLOPs, train nothing")
        for action in self._actions:
            if action.dest not in ("set", "help"):
                action.default = argparse.SUPPRESS  # so that what is parsed is what was given

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The flags that ``argv`` gives, converted to their types."""
        known, unknown = self.parse_known_args(list(argv))
        if unknown:
            name = unknown[0].partition("=")[0]
            raise ConfigError(f"unknown flag {name!r}{near_flag(name, self._option_string_actions)}")
        return vars(known)


def near_flag(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, where one is near."""
    close = difflib.get_close_matches(name.replace("-", "_"), [k.replace("-", "_") for k in known], n=1)
    near = next((k for k in known if close and k.replace("-", "_") == close[0]), None)
    return f". Did you mean {near!r}?" if near else ". 'tove-llava train --help' lists all flags"


def parse(argv: Sequence[str]) -> Settings:
    """Reads the command line of a run.

    Raises:
        ConfigError: an unknown flag, preset, stage or key, or a missing setting.
    """
    given = Parser().given(argv)
    run_fields = {f.name for f in dataclasses.fields(RunArguments)}
    run = RunArguments(**{key: value for key, value in given.items() if key in run_fields})
    preset = load_preset(run.preset, given["set"])
    stage = _override_stage(preset.stage(run.stage), run)
    execution_mode(stage.tower_execution)

    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    for key in stage.arguments:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"preset {run.preset}: stages.{run.stage}.arguments: unknown key {key!r}.{hint}")
    flags = {k: v for k, v in given.items() if k not in run_fields and k != "set"}
    training = {**stage.arguments, **flags}
    stage = _resolve_checkpointing(stage, run, flags)
    if training.get("use_liger_kernel"):
        raise ConfigError("--use_liger_kernel does not know this model; give --fused_kernels True")
    if run.data_path is None or run.image_folder is None:
        raise ConfigError("--data_path and --image_folder are needed: LLaVA records and the folder of their images")
    if not training.get("output_dir"):
        raise ConfigError("--output_dir is needed: the folder that the run writes")
    cache = run.merge_feature_cache or (None if run.merge_data_path else run.feature_cache)
    return Settings(
        preset=preset,
        stage_name=run.stage,
        stage=stage,
        data_path=_existing(run.data_path, "--data_path"),
        image_folder=_existing(run.image_folder, "--image_folder"),
        output_dir=Path(training.pop("output_dir")),
        pretrained=_existing(run.pretrained, "--pretrained") if run.pretrained else None,
        self_contained=run.self_contained,
        allow_image_links=run.allow_image_links,
        feature_cache=_existing(run.feature_cache, "--feature_cache") if run.feature_cache else None,
        merge_data_path=_existing(run.merge_data_path or run.data_path, "--merge_data_path"),
        merge_image_folder=_existing(run.merge_image_folder or run.image_folder, "--merge_image_folder"),
        merge_feature_cache=_existing(cache, "--merge_feature_cache") if cache else None,
        template_given=run.template is not None,
        training=training,
    )


def resolve_deepspeed(name: str | None) -> str | None:
    """The path of a DeepSpeed configuration, or None where the run does not use DeepSpeed.

    Args:
        name: a file's stem in ``tove_llava/train/deepspeed``, a path, or ``none``. It applies to processes that a
            launcher started; a process on its own trains without DeepSpeed.

    Raises:
        ConfigError: no such configuration, or DeepSpeed is not installed.
    """
    if name is None or name.lower() == "none" or "WORLD_SIZE" not in os.environ:
        return None
    path = Path(name)
    if path.suffix != ".json":
        names = sorted(p.stem for p in CONFIG_FOLDER.glob("*.json"))
        if name not in names:
            raise ConfigError(
                f"unknown DeepSpeed configuration {name!r}; known: {', '.join(names)}, none, or a .json file"
            )
        path = CONFIG_FOLDER / f"{name}.json"
    if not path.is_file():
        raise ConfigError(f"DeepSpeed configuration {path} does not exist")
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "DeepSpeed is not installed: pip install deepspeed, or train without it by --deepspeed none"
        ) from error
    return str(path)


def _override_stage(stage: StagePreset, run: RunArguments) -> StagePreset:
    names = ["template", "image_aspect_ratio", "image_resize", "group_by_modality_length", "model_max_length"]
    names += ("padding_free", "tower_execution", "fused_kernels", "checkpointing_gib")
    names += ("projector_learning_rate", "tower_learning_rate", "encoder_learning_rate")
    changes = {name: getattr(run, name) for name in names if getattr(run, name) is not None}
    lora: dict[str, Any] = {"r": run.lora_r, "alpha": run.lora_alpha, "dropout": run.lora_dropout}
    lora = {key: value for key, value in lora.items() if value is not None}
    if lora:
        if stage.lora is None:
            raise ConfigError(f"--lora_{next(iter(lora))}: stage {run.stage!r} trains without LoRA")
        changes["lora"] = dataclasses.replace(stage.lora or LoraPreset(), **lora)
    changes["quantization"] = _quantization(stage, run)
    merge: dict[str, Any] = {
        name: getattr(run, f"merge_{name}")
        for name in ("loss", "coefficient", "images_per_record", "optimizer", "token_weights", "layers")
        if getattr(run, f"merge_{name}") is not None
    }
    if run.merge_lora_r is not None:
        merge["lora"] = LoraPreset(r=run.merge_lora_r, alpha=2 * run.merge_lora_r, dropout=0.0)
        merge["lora"] = merge["lora"] if run.merge_lora_r > 0 else None
    if merge:
        if stage.merge is None:
            raise ConfigError(f"--merge_{next(iter(merge))}: stage {run.stage!r} merges nothing; use --stage merge")
        changes["merge"] = dataclasses.replace(stage.merge, **merge)
    return dataclasses.replace(stage, **changes)


def _resolve_checkpointing(stage: StagePreset, run: RunArguments, flags: dict[str, Any]) -> StagePreset:
    """The stage with its kind of checkpointing said; transformers' flag for it is understood too."""
    name = next((name for name in _CHECKPOINTING if flags.get(name) is not None), None)
    if name is not None:
        kind = FULL if flags[name] else NONE
        if run.checkpointing not in (None, kind):
            raise ConfigError(f"--{name} {flags[name]} and --checkpointing {run.checkpointing}: give one of them")
        stage = dataclasses.replace(stage, checkpointing=kind)
    kind = run.checkpointing or stage.kept
    check_kind(kind)
    if stage.checkpointing_gib is not None:
        if kind != SELECTIVE:
            raise ConfigError(f"checkpointing_gib is of selective checkpointing, and this is {kind!r}; leave it out")
        if stage.checkpointing_gib < 0:
            raise ConfigError(f"checkpointing_gib must not be negative, and is {stage.checkpointing_gib}")
    return dataclasses.replace(stage, checkpointing=kind)


def _quantization(stage: StagePreset, run: RunArguments) -> QuantizationPreset | None:
    bits = run.bits if run.bits is not None else stage.quantization.bits if stage.quantization else 16
    kind: dict[str, Any] = {"quant_type": run.quant_type, "double_quant": run.double_quant}
    kind = {key: value for key, value in kind.items() if value is not None}
    if kind and bits != 4:
        raise ConfigError(f"--{next(iter(kind))} is of 4 bits, and stage {run.stage!r} has {bits}; give --bits 4")
    if bits == 16:
        return None
    return dataclasses.replace(stage.quantization or QuantizationPreset(), bits=bits, **kind)


def _existing(path: str, flag: str) -> Path:
    if not Path(path).exists():
        raise ConfigError(f"{flag} {path} does not exist{_HINTS.get(flag, '')}")
    return Path(path)


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
