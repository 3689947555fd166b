"""Read a run's command line: a preset's stage, overridden by flags.

The flags are those of :mod:`tove_llava.train.flags` and of ``transformers.TrainingArguments``.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from tove_llava.core.errors import ConfigError
from tove_llava.core.registry import closest
from tove_llava.data.data_paths import data_paths
from tove_llava.presets import LoraPreset, MergePreset, Preset, QuantizationPreset, StagePreset, load_preset
from tove_llava.tower.execution import execution_mode
from tove_llava.train.argument_rules import HONOURED, argument_defaults, check_arguments
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


# Flags that need held-out records, or benchmarks, or either.
_OF_RECORDS = ("eval_image_folder", "keep_best")
_OF_BENCHMARKS = ("eval_benchmarks_limit", "eval_data_root")
_OF_EITHER = ("eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size", "eval_strategy")


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
    """Return transformers' flags that have an effect and are not on the help page, with their fields."""
    return {f.name: f for f in dataclasses.fields(TrainingArguments) if f.name in HONOURED - COMMON.keys()}


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
        eval_benchmarks=run.eval_benchmarks,
        eval_benchmarks_limit=run.eval_benchmarks_limit,
        eval_data_root=run.eval_data_root,
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
    known = argument_defaults()
    where = f"preset {run.preset}: stages.{run.stage}.arguments"
    for key in stage.arguments:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}.{closest(key, known)}")
    flags = {key: value for key, value in given.items() if key in known}
    training = {**_as_flags(stage.arguments, where), **flags}
    _evaluation(training, run, given)
    check_arguments(training, flags)
    return training


def _as_flags(arguments: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert a preset's arguments to their types, as flags are converted."""
    plain = {key: value for key, value in arguments.items() if isinstance(value, str | int | float)}
    for key, value in arguments.items():
        if value is None and argument_defaults()[key] is not None:
            raise ConfigError(f"{where}: {key} is empty; give a value, or leave the key out")
    try:
        read = Parser().given([f"--{key}={value}" for key, value in plain.items()])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return {key: read.get(key, value) for key, value in arguments.items()}


def _evaluation(training: dict[str, Any], run: RunArguments, given: dict[str, Any]) -> None:
    """Decide when the model is evaluated; refuse flags that need an evaluation."""
    records, benchmarks = run.eval_data_path is not None, run.eval_benchmarks is not None
    strategy = training.get("eval_strategy")
    asked = {key for key, value in given.items() if value is not None} | ({"eval_strategy"} if strategy else set())
    asked -= {"eval_strategy"} if strategy == "no" else set()
    for there, keys, remedy in (
        (records, _OF_RECORDS, "held-out records: --eval_data_path FILE"),
        (benchmarks, _OF_BENCHMARKS, "benchmarks: --eval_benchmarks A,B"),
        (records or benchmarks, _OF_EITHER, "held-out records: --eval_data_path FILE (or --eval_benchmarks A,B)"),
    ):
        for key in keys:
            if key in asked and not there:
                raise ConfigError(f"--{key} needs {remedy}")
    schedule = training.get("lr_scheduler_type")
    if schedule in ("reduce_lr_on_plateau", "greedy") and not records:
        raise ConfigError(f"--lr_scheduler_type {schedule} needs held-out records: --eval_data_path FILE")
    if run.eval_benchmarks_limit < 1:
        raise ConfigError(f"--eval_benchmarks_limit must be at least 1, not {run.eval_benchmarks_limit}")
    if not records and not benchmarks:
        return
    if strategy == "no":
        raise ConfigError("nothing is evaluated with eval_strategy no; leave it out, or the data to evaluate on")
    if strategy == "steps" and training.get("eval_steps") is None:
        raise ConfigError("--eval_strategy steps needs --eval_steps N")
    training["eval_strategy"] = strategy or ("epoch" if training.get("eval_steps") is None else "steps")


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
        rank = run.merge_lora_r
        merge["lora"] = LoraPreset(r=rank, alpha=2 * rank, dropout=0.0) if rank else None
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
