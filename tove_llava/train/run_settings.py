"""Hold a run's settings; make its ``TrainingArguments`` and its record."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from tove_llava.core.errors import ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.data.data_paths import described, size_of
from tove_llava.presets import Preset, StagePreset
from tove_llava.train.argument_rules import FIXED, UnplacedArguments, check_parts
from tove_llava.train.stages import MERGE_OPTIMIZERS, POLICIES

DEEPSPEED_FOLDER = Path(__file__).parent / "deepspeed"
CHECKPOINTING_FLAGS = ("gradient_checkpointing", "activation_checkpointing")  # older and newer transformers' name

# Arguments that change neither data nor weights: a run may be continued with other values of them.
OPERATIONAL = frozenset(
    {
        "output_dir", "logging_steps", "logging_dir", "logging_first_step", "logging_strategy", "save_steps",
        "report_to", "save_strategy", "save_total_limit", "disable_tqdm", "dataloader_num_workers",
        "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers", "run_name",
        "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size",
        "log_level", "log_level_replica", "ddp_timeout", "project", "include_num_input_tokens_seen",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The settings of a run."""

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
    eval_data_path: Path | None
    eval_image_folder: Path
    keep_best: bool
    eval_benchmarks: str | None
    eval_benchmarks_limit: int
    eval_data_root: str | None
    template_given: bool  # by a flag, not by the preset
    training: dict[str, Any]  # TrainingArguments that the preset or a flag gives

    def check(self) -> None:
        """Refuse settings with which transformers, peft, torch or DeepSpeed would fail after the weights are loaded.

        Raises:
            ConfigError: a value is refused, or has no effect here.
        """
        POLICIES.get(self.stage.train)
        chosen = self.training.get("deepspeed")
        if self.stage.merge is not None:
            optimizer, optim = self.stage.merge.optimizer, self.training.get("optim", "adamw_torch")
            MERGE_OPTIMIZERS.get(optimizer)
            if optimizer == "muon" and not optim.startswith("adamw"):
                raise ConfigError(f"--optim {optim}: merge optimizer muon has AdamW for the other parameters")
        if chosen not in (None, "none") and "WORLD_SIZE" not in os.environ:
            raise ConfigError(
                f"--deepspeed {chosen} has no effect in a process that no launcher started: tove-llava launch "
                f"{self.stage_name} starts one; --deepspeed none trains without DeepSpeed"
            )
        if self.training.get("fp16") and self.device().type == "cpu":
            raise ConfigError("--fp16 has no effect on a CPU; give --bf16 True, or leave it out")
        check_parts(self.training_arguments(UnplacedArguments, deepspeed=None))
        self._check_deepspeed()

    def _check_deepspeed(self) -> None:
        """Refuse what a DeepSpeed configuration cannot do."""
        file, stage = self.deepspeed_file(), self.stage
        if file is None:
            return
        if stage.merge is not None and stage.merge.optimizer != "adamw":
            raise ConfigError(
                f"merge optimizer {stage.merge.optimizer!r} needs whole matrices, which DeepSpeed cuts up; give "
                "--deepspeed none (DEEPSPEED_CONFIG=none), or --merge_optimizer adamw"
            )
        if read_json_object(file, ConfigError, "check --deepspeed").get("zero_optimization", {}).get("stage") != 3:
            return
        other = "does not run under ZeRO-3; give --deepspeed zero2 (DEEPSPEED_CONFIG=zero2)"
        if stage.quantization is not None:
            raise ConfigError(f"a language model in {stage.quantization} {other}")
        if self.eval_benchmarks is not None:
            raise ConfigError(f"--eval_benchmarks {other}, or evaluate the trained model: tove-llava eval")

    def training_arguments(self, kind: type[TrainingArguments] = TrainingArguments, **more: Any) -> TrainingArguments:
        """Build ``TrainingArguments``. Call it after the model exists.

        Building them starts DeepSpeed's configuration, and under ZeRO-3 with bf16 the model has to exist before that.

        Raises:
            ConfigError: a value is refused by transformers.
        """
        on_cpu = bool(self.training.get("use_cpu")) or not _has_accelerator()
        pinned = self.training.get("dataloader_pin_memory", not on_cpu)
        fixed = {
            **{key: value for key, (value, _) in FIXED.items()},
            "logging_first_step": True,
            "ddp_find_unused_parameters": True,  # a text-only step leaves the tower unused
            "use_cpu": on_cpu,
            "dataloader_pin_memory": pinned,
            "accelerator_config": {"non_blocking": pinned},  # a batch is copied while the step before it runs
        }
        # Checkpointing is set on the model itself (tove_llava.train.recomputation). Signals are handled for all ranks
        # (tove_llava.train.interrupts); transformers' checkpoint at SIGTERM would be of one rank.
        elsewhere = ("deepspeed", "enable_jit_checkpoint", *CHECKPOINTING_FLAGS)
        given = {key: value for key, value in self.training.items() if key not in elsewhere}
        try:
            return kind(
                **{**fixed, **given, "output_dir": str(self.output_dir), "deepspeed": self.deepspeed_file(), **more}
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"training arguments: {error}") from error

    def deepspeed_file(self) -> str | None:
        """Return the path of the run's DeepSpeed configuration, or None."""
        return resolve_deepspeed(self.training.get("deepspeed", self.stage.deepspeed))

    def device(self) -> torch.device:
        """Return the device of this process."""
        if self.training.get("use_cpu") or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def compute_dtype(self) -> torch.dtype | None:
        """Return the dtype of mixed precision, or None."""
        if self.training.get("bf16"):
            return torch.bfloat16
        return torch.float16 if self.training.get("fp16") else None

    def record(self) -> dict[str, Any]:
        """Return the settings that decide the outcome, as flat plain data.

        A run may continue another one if their records are equal. A setting that is newer than some runs is None at its
        default, as in their records.
        """
        preset, stage = self.preset.to_dict(), dataclasses.asdict(self.stage)
        for key in ("checkpointing", "checkpointing_gib", "tower_execution"):  # same results, up to rounding
            del stage[key]
        stage["fused_kernels"] = stage["fused_kernels"] or None
        stage["image_resize"] = None if stage["image_resize"] == "pillow" else stage["image_resize"]
        stage["image_placeholder"] = None if stage["image_placeholder"] == "written" else stage["image_placeholder"]
        arguments = {**stage.pop("arguments"), **self.training}
        parts = {
            "preset": preset["name"],
            "stage": self.stage_name,
            "vision": preset["vision"],
            "language": preset["language"],
            "projector": preset["projector"],
            "settings": stage,
            "arguments": {key: value for key, value in arguments.items() if key not in OPERATIONAL},
            "data_path": described(self.data_path),
            "data_bytes": size_of(self.data_path),
            "image_folder": str(self.image_folder.resolve()),
            "pretrained": str(self.pretrained.resolve()) if self.pretrained else None,
            "merge_data_path": described(self.merge_data_path) if self.stage.merge else None,
        }
        return dict(_flatten(parts))


def resolve_deepspeed(name: str | None) -> str | None:
    """Return the path of a DeepSpeed configuration, or None without DeepSpeed.

    A process that no launcher started trains without DeepSpeed.

    Args:
        name: a file's stem in ``tove_llava/train/deepspeed``, a path, or ``none``.

    Raises:
        ConfigError: no such configuration, or DeepSpeed is not installed.
    """
    if name is None or name.lower() == "none" or "WORLD_SIZE" not in os.environ:
        return None
    path = Path(name)
    if path.suffix != ".json":
        names = sorted(p.stem for p in DEEPSPEED_FOLDER.glob("*.json"))
        if name not in names:
            raise ConfigError(
                f"unknown DeepSpeed configuration {name!r}; known: {', '.join(names)}, none, or a .json file"
            )
        path = DEEPSPEED_FOLDER / f"{name}.json"
    if not path.is_file():
        raise ConfigError(f"DeepSpeed configuration {path} does not exist")
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "DeepSpeed is not installed: pip install deepspeed, or train without it by --deepspeed none"
        ) from error
    return str(path)


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
