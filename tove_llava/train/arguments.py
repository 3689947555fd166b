"""Read a run's command line: a preset's stage, overridden by flags.

The flags are those of :mod:`tove_llava.train.flags` and of ``transformers.TrainingArguments``.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tove_llava.core.errors import ConfigError
from tove_llava.core.registry import closest
from tove_llava.data.data_paths import data_paths
from tove_llava.presets import LoraPreset, MergePreset, Preset, QuantizationPreset, StagePreset, load_preset
from tove_llava.tower.execution import execution_mode
from tove_llava.train.flags import COMMON, RunArguments, StageFlags, given_for, suggestion
from tove_llava.train.recomputation import FULL, NONE, SELECTIVE, check_kind
from tove_llava.train.run_settings import CHECKPOINTING_FLAGS, Settings

_SCENES = (
    ". Give your own, or make the playground's: tove-llava scenes --out playground/data/scenes --train 8000 --val 300"
)
_HINTS = {
    "--data_path": _SCENES,
    "--image_folder": _SCENES,
    "--feature_cache": ". Make it first: tove-llava features --help",
    "--pretrained": ". Name the folder of the stage before (launch: STAGE1_DIR, or MODEL_DIR of a merge)",
}


class Parser(HfArgumentParser):
    """A parser that refuses abbreviations and raises :class:`ConfigError` instead of exiting."""

    def __init__(self) -> None:
        super().__init__([RunArguments, StageFlags, TrainingArguments], allow_abbrev=False, add_help=False)
        self.add_argument("--set", action="append", default=[])
        self.add_argument("--meta", action="store_true")
        self.add_argument("--print-config", "--print_config", action="store_true")
        for action in self._actions:
            if action.dest != "set":
                action.default = argparse.SUPPRESS  # so that only flags that were given are in the result

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the flags that ``argv`` gives, converted to their types."""
        known, unknown = self.parse_known_args(list(argv))
        if unknown:
            name = unknown[0].partition("=")[0]
            raise ConfigError(f"unknown flag {name!r}.{suggestion(name, further_flags())}")
        return vars(known)

    def flags(self) -> set[str]:
        """List the names of all flags."""
        return {action.dest for action in self._actions}


def further_flags() -> dict[str, Any]:
    """Return transformers' flags that the help page leaves out, with their fields."""
    return {f.name: f for f in dataclasses.fields(TrainingArguments) if f.init and f.name not in COMMON}


def parse(argv: Sequence[str]) -> Settings:
    """Read the command line of a run.

    Raises:
        ConfigError: an unknown flag, preset, stage or key, or a missing setting.
    """
    given = Parser().given(argv)
    run, preset, stage, training = resolve(given)
    if run.data_path is None or run.image_folder is None:
        raise ConfigError("--data_path and --image_folder are needed: LLaVA records and the folder of their images")
    if not training.get("output_dir"):
        raise ConfigError("--output_dir is needed: the folder that the run writes")
    cache = run.merge_feature_cache or (None if run.merge_data_path else run.feature_cache)
    return Settings(
        preset=preset,
        stage_name=run.stage,
        stage=stage,
        data_path=_existing_data(run.data_path, "--data_path"),
        image_folder=_existing(run.image_folder, "--image_folder"),
        output_dir=Path(training.pop("output_dir")),
        pretrained=_existing(run.pretrained, "--pretrained") if run.pretrained else None,
        self_contained=run.self_contained,
        allow_image_links=run.allow_image_links,
        feature_cache=_existing(run.feature_cache, "--feature_cache") if run.feature_cache else None,
        merge_data_path=_existing_data(run.merge_data_path or run.data_path, "--merge_data_path"),
        merge_image_folder=_existing(run.merge_image_folder or run.image_folder, "--merge_image_folder"),
        merge_feature_cache=_existing(cache, "--merge_feature_cache") if cache else None,
        eval_data_path=_existing_data(run.eval_data_path, "--eval_data_path") if run.eval_data_path else None,
        eval_image_folder=_existing(run.eval_image_folder or run.image_folder, "--eval_image_folder"),
        keep_best=run.keep_best,
        template_given=given.get("template") is not None,
        training=training,
    )


def resolve(given: dict[str, Any]) -> tuple[RunArguments, Preset, StagePreset, dict[str, Any]]:
    """Return the run's own flags, its preset, its stage with flags applied, and the ``TrainingArguments`` given.

    Raises:
        ConfigError: an unknown preset, stage or key, or a value that does not suit the stage.
    """
    own = {f.name for f in dataclasses.fields(RunArguments)}
    run = RunArguments(**{key: value for key, value in given.items() if key in own})
    preset = load_preset(run.preset, given["set"])
    stage = _checkpointing(_overridden(preset.stage(run.stage), run, given), given)
    execution_mode(stage.tower_execution)
    return run, preset, stage, _training(stage, run, given)


def _training(stage: StagePreset, run: RunArguments, given: dict[str, Any]) -> dict[str, Any]:
    """Return the ``TrainingArguments`` that the stage or a flag gives."""
    known = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    for key in stage.arguments:
        if key not in known:
            where = f"preset {run.preset}: stages.{run.stage}.arguments"
            raise ConfigError(f"{where}: unknown key {key!r}.{closest(key, known)}")
    training = {**stage.arguments, **{key: value for key, value in given.items() if key in known}}
    if training.get("use_liger_kernel"):
        raise ConfigError("--use_liger_kernel does not know this model; give --fused_kernels True")
    _check_reports(training.get("report_to"))
    _check_numbers(training)
    asked = next((key for key in ("eval_steps", "eval_image_folder", "keep_best") if given.get(key) is not None), None)
    if run.eval_data_path is not None:
        training["eval_strategy"] = "epoch" if training.get("eval_steps") is None else "steps"
    elif asked is not None or training.get("eval_strategy", "no") != "no":
        raise ConfigError(f"--{asked or 'eval_strategy'} needs held-out records: --eval_data_path FILE")
    return training


def _check_numbers(training: dict[str, Any]) -> None:
    """Refuse numbers with which torch or transformers fail later, or train nothing."""
    counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for key in counts:
        if training.get(key) is not None and training[key] < 1:
            raise ConfigError(f"--{key} must be at least 1, not {training[key]}")
    for key in ("learning_rate", "weight_decay", "max_grad_norm"):
        if training.get(key) is not None and not 0 <= training[key] < math.inf:
            raise ConfigError(f"--{key} must be a number from 0, not {training[key]}")
    if training.get("max_steps") is not None and training["max_steps"] < 1 and training["max_steps"] != -1:
        raise ConfigError(f"--max_steps must be at least 1 (or -1, for epochs), not {training['max_steps']}")
    if training.get("num_train_epochs") is not None and not training["num_train_epochs"] > 0:
        raise ConfigError(f"--num_train_epochs must be above 0, not {training['num_train_epochs']}")


def _check_reports(report_to: str | Sequence[str] | None) -> None:
    available = [*get_available_reporting_integrations(), "flyte", "all", "none"]  # flyte checks itself
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name not in INTEGRATION_TO_CALLBACK and name not in available:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise ConfigError(
                f"--report_to {name}: unknown.{closest(name, known)} Known: {', '.join(known)}, all, none"
            )
        if name not in available:
            raise ConfigError(f"--report_to {name}: the package is not installed (pip install {name})")


def _overridden(stage: StagePreset, run: RunArguments, given: dict[str, Any]) -> StagePreset:
    changes = given_for(StagePreset, given)
    lora = given_for(LoraPreset, given)
    if lora:
        if stage.lora is None:
            raise ConfigError(f"--lora_{next(iter(lora))}: stage {run.stage!r} trains without LoRA")
        changes["lora"] = dataclasses.replace(stage.lora, **lora)
    changes["quantization"] = _quantization(stage, run, given_for(QuantizationPreset, given))
    merge = given_for(MergePreset, given)
    if run.merge_lora_r is not None:
        adapters = LoraPreset(r=run.merge_lora_r, alpha=2 * run.merge_lora_r, dropout=0.0)
        merge["lora"] = adapters if run.merge_lora_r > 0 else None
    if merge:
        if stage.merge is None:
            raise ConfigError(f"--merge_{next(iter(merge))}: stage {run.stage!r} merges nothing; use --stage merge")
        changes["merge"] = dataclasses.replace(stage.merge, **merge)
    return dataclasses.replace(stage, **changes)


def _quantization(stage: StagePreset, run: RunArguments, given: dict[str, Any]) -> QuantizationPreset | None:
    bits = given.pop("bits", 16 if stage.quantization is None else stage.quantization.bits)
    if given and bits != 4:
        raise ConfigError(f"--{next(iter(given))} needs 4 bits, and stage {run.stage!r} has {bits}; give --bits 4")
    if bits == 16:
        return None
    return dataclasses.replace(stage.quantization or QuantizationPreset(), bits=bits, **given)


def _checkpointing(stage: StagePreset, given: dict[str, Any]) -> StagePreset:
    """Resolve the kind of checkpointing, from transformers' flag for it too."""
    for name in CHECKPOINTING_FLAGS:
        if given.get(name) is not None:
            kind = FULL if given[name] else NONE
            asked = given.get("checkpointing", kind)
            if asked != kind:
                raise ConfigError(f"--{name} {given[name]} and --checkpointing {asked}: give one of them")
            stage = dataclasses.replace(stage, checkpointing=kind)
            break
    check_kind(stage.kept)
    if stage.checkpointing_gib is not None:
        if stage.kept != SELECTIVE:
            raise ConfigError(f"checkpointing_gib needs selective checkpointing, not {stage.kept!r}; leave it out")
        if stage.checkpointing_gib < 0:
            raise ConfigError(f"checkpointing_gib must not be negative, and is {stage.checkpointing_gib}")
    return dataclasses.replace(stage, checkpointing=stage.kept)


def _existing(path: str, flag: str) -> Path:
    if not Path(path).exists():
        raise ConfigError(f"{flag} {path} does not exist{_HINTS.get(flag, '')}")
    return Path(path)


def _existing_data(paths: str, flag: str) -> Path:
    for entry in data_paths(paths):
        _existing(str(entry.path), flag)
        if entry.weight != 1 and flag == "--eval_data_path":
            raise ConfigError(f"{flag} {paths}: held-out records have no weights; each counts once")
    return Path(paths)
