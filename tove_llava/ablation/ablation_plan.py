"""Read the YAML file of an ablation: arms, stages, seeds, and what is evaluated."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from tove_llava.core.errors import ConfigError
from tove_llava.core.files import read_text
from tove_llava.core.mappings import from_mapping, merged, override_key, parse_yaml
from tove_llava.core.plugins import add_plugins
from tove_llava.core.registry import closest

OUT = "{out}"  # in a text of the file: the output folder


@dataclass
class StagePlan:
    """A stage of an arm; it starts from the one before."""

    data_path: str
    image_folder: str | None = None  # default: the file's
    flags: dict[str, Any] = field(default_factory=dict)  # of tove-llava train


@dataclass
class ArmPlan:
    """A named arm, as the file has it."""

    set: list[str] = field(default_factory=list)
    preset: str | None = None
    stages: dict[str, Any] = field(default_factory=dict)  # merged into the file's; a new one follows them


@dataclass
class EvaluationPlan:
    """The evaluation of each arm's last model; the keys are flags of tove-llava eval."""

    benchmarks: list[str]
    data_root: str
    conditions: list[str] = field(default_factory=lambda: ["full"])
    limit: int | None = None
    batch_size: int = 32

    def flags(self) -> list[str]:
        words = ["--benchmark", ",".join(self.benchmarks), "--data-root", self.data_root]
        words += ["--conditions", ",".join(self.conditions), "--batch-size", str(self.batch_size)]
        return words if self.limit is None else [*words, "--limit", str(self.limit)]


@dataclass
class _File:
    stages: dict[str, Any]
    preset: str = "tiny"
    set: list[str] = field(default_factory=list)
    image_folder: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    arms: dict[str, ArmPlan] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    evaluate: EvaluationPlan | None = None
    feature_cache: str | None = None  # how values are stored: float32, float16, int8; none by default
    plugins: list[str] = field(default_factory=list)
    gpus: int = 1  # of each training; several are started by tove-llava launch


@dataclass(frozen=True)
class Arm:
    """An arm of an ablation.

    Attributes:
        where: names it in errors.
        overrides: ``key.path=value`` of its preset.
    """

    name: str
    where: str
    preset: str
    overrides: Sequence[str]
    stages: Mapping[str, StagePlan]


@dataclass(frozen=True)
class Plan:
    """A whole ablation.

    Attributes:
        where: names its file in errors.
        chosen: names of the arms to run; the others are only in the results.
    """

    where: str
    arms: Sequence[Arm]
    chosen: Collection[str]
    seeds: Sequence[int]
    evaluation: EvaluationPlan | None
    feature_cache: str | None
    gpus: int


def read_plan(file: str | Path, out: Path, overrides: Sequence[str] = (), arms: Sequence[str] = ()) -> Plan:
    """Read an ablation.

    Args:
        overrides: ``key.path=value`` of the file's keys.
        arms: run these; all by default.

    Raises:
        ConfigError: an unknown key or arm, a value of another type, or no arm; the message names file and key.
    """
    where = f"ablation {file}"
    data = parse_yaml(read_text(file, ConfigError), where)
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of keys, got {type(data).__name__}")
    for override in overrides:
        override_key(data, override)
    data = _with_out(data, str(out))
    named = data.get("arms")
    if isinstance(named, dict):  # a list is short for only overrides
        data["arms"] = {str(name): {"set": arm} if isinstance(arm, list) else arm or {} for name, arm in named.items()}
    read = from_mapping(_File, data, where)
    for key, value in {"stages": len(read.stages), "seeds": len(read.seeds), "gpus": read.gpus}.items():
        if value < 1:
            raise ConfigError(f"{where}: {key}: at least one is needed")
    add_plugins(read.plugins)
    found = _grid(read, where) + [_arm(read, where, name, arm) for name, arm in read.arms.items()]
    names = [arm.name for arm in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{where}: two arms are called {twice!r}; name one of them under 'arms'")
    for name in arms:
        if name not in names:
            raise ConfigError(f"{where}: there is no arm {name!r}.{closest(name, names)} Known: {', '.join(names)}")
    return Plan(where, found, arms or names, read.seeds, read.evaluate, read.feature_cache, read.gpus)


def _with_out(value: Any, out: str) -> Any:
    if isinstance(value, str):
        return value.replace(OUT, out)
    if isinstance(value, dict):
        return {key: _with_out(entry, out) for key, entry in value.items()}
    return [_with_out(entry, out) for entry in value] if isinstance(value, list) else value


def _arm(read: _File, where: str, name: str, arm: ArmPlan) -> Arm:
    if re.search(r"[^\w.,=+%-]", name) or name.startswith("."):
        raise ConfigError(f"{where}: arms: {name!r} is no name for a folder; use letters, digits and . , = + % - _")
    return _checked(read, f"{where}: arms.{name}", name, arm)


def _grid(read: _File, where: str) -> list[Arm]:
    """Make an arm for each combination of the axes' values; without axes or arms, one."""
    if not read.axes:
        return [] if read.arms else [_checked(read, where, Path(read.preset).stem, ArmPlan())]
    found = []
    for values in product(*read.axes.values()):
        pairs = list(zip(read.axes, values, strict=True))
        name = ",".join(_named(key, value) for key, value in pairs)
        overrides = [f"{key}={_flow(value)}" for key, value in pairs]
        found.append(_checked(read, f"{where}: axes ({', '.join(overrides)})", name, ArmPlan(set=overrides)))
    return found


def _checked(read: _File, where: str, name: str, arm: ArmPlan) -> Arm:
    """Check an arm's stages, and give them the file's flags and images."""
    stages = {}
    for stage, plan in merged(read.stages, arm.stages).items():
        given = from_mapping(StagePlan, plan, f"{where}: stages.{stage}")
        folder = given.image_folder or read.image_folder
        if folder is None:
            raise ConfigError(f"{where}: stages.{stage}: needs an 'image_folder', here or for the whole file")
        stages[stage] = StagePlan(given.data_path, folder, {**read.flags, **given.flags})
    return Arm(name, where, arm.preset or read.preset, [*read.set, *arm.set], stages)


def _named(key: str, value: Any) -> str:
    """Name an axis' value for a folder."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, list) and value:
        text = "+".join(str(entry.get("name", entry) if isinstance(entry, dict) else entry) for entry in value)
    else:
        shown = "none" if value in (None, []) else str(value).lower()
        text = f"{key.rpartition('.')[2]}={shown}"
    return re.sub(r"[^\w.,=+%-]", "_", text)


def _flow(value: Any) -> str:
    """Write a value as YAML in one line."""
    return yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]
