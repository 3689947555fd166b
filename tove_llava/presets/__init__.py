"""Presets: the parts of a model and the settings of its training stages, as data.

A preset is a YAML file of this package or any YAML file in the same form. ``extends: NAME`` starts from another preset
and replaces what the file gives (mappings are merged, lists and values replaced). Any key can be overridden with
``key.path=value``; an entry of ``vision.experts`` is addressed by its name: ``vision.experts.depth.mode=features``.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tove_llava.core.errors import ConfigError

_HERE = Path(__file__).parent
T = TypeVar("T")


@dataclass
class VisionPreset:
    """The tower. Every key but ``clip`` and ``clip_config`` is the ``ToveVisionConfig`` argument of that name."""

    clip: str
    clip_revision: str | None = None
    clip_config: dict[str, Any] | None = None  # known architecture of a source out of reach; else it is read
    clip_layer: int = -2
    image_size: int | None = None
    experts: list[dict[str, Any]] = field(default_factory=list)
    fusion: str = "tove"
    fusion_options: dict[str, Any] = field(default_factory=dict)
    projection_dim: int | None = None
    noisy_gating: bool = True
    top_k: int | None = None
    null_slot: bool = False
    router_aux_loss_coef: float = 0.01


@dataclass
class LanguagePreset:
    """The language model: ``source`` gives weights and tokenizer, ``config`` its architecture without them."""

    source: str
    revision: str | None = None
    dtype: str = "float32"
    attention: str | None = None
    image_token: str = "<image>"
    tokenizer: str | None = None  # another source for the tokenizer alone
    config: dict[str, Any] | None = None


@dataclass
class ProjectorPreset:
    """The MLP between tower and language model (LLaVA's ``mlp2x_gelu``)."""

    hidden_act: str = "gelu"
    bias: bool = True


@dataclass
class LoraPreset:
    """Low-rank adapters on the linear layers of the language model."""

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05
    bias: str = "none"


@dataclass(frozen=True)
class QuantizationPreset:
    """How the language model's frozen linear layers are held (:mod:`tove_llava.llava.quantization`); LLaVA's names.

    Raises:
        ConfigError: another number of bits or type.
    """

    bits: int = 4  # or 8: LLM.int8(), for which the other keys mean nothing
    quant_type: str = "nf4"  # or fp4
    double_quant: bool = True  # the scales are quantised as well

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"quantization: bits must be 4 or 8, not {self.bits!r}; leave it out for full precision")
        if self.quant_type not in ("nf4", "fp4"):
            raise ConfigError(f"quantization: quant_type must be nf4 or fp4, not {self.quant_type!r}")

    def __str__(self) -> str:
        if self.bits == 8:
            return "8 bits"
        return f"4 bits ({self.quant_type}{', double quantisation' if self.double_quant else ''})"

    def same_weights(self, other: "QuantizationPreset") -> bool:
        """Whether both give the same values."""
        return self == other or self.bits == other.bits == 8


@dataclass
class MergePreset:
    """How a copy of CLIP learns to predict the tower's tokens (:mod:`tove_llava.train.merging`)."""

    loss: str = "mse"  # a registered merge loss: mse, smooth_l1, cosine
    coefficient: float = 1.0  # of the merge loss beside the language model's
    images_per_record: int = 0  # further images that each record brings, for the merge loss alone: it needs no text
    token_weights: str = "uniform"  # or transfer: tokens count by how much was transferred to them
    layers: list[int] | None = None  # blocks of CLIP that learn; None: all of them, and the embeddings
    optimizer: str = "adamw"  # of the student's matrices: adamw or muon (tove_llava.train.optimizer)
    lora: LoraPreset | None = None  # adapters on these blocks instead of their own weights


@dataclass
class StagePreset:
    """One training stage."""

    train: str  # a registered freezing policy (tove_llava.train.stages)
    template: str
    image_aspect_ratio: str = "pad"
    image_resize: str = "pillow"  # or torch: faster, within a stated tolerance (tove_llava.data.resize)
    group_by_modality_length: bool = False
    model_max_length: int = 2048
    padding_free: bool = False  # the sequences of a batch in one row, with no padding between them
    tower_execution: str = "eager"  # how CLIP and the experts are run: eager, concurrent or compiled
    fused_kernels: bool = False  # liger-kernel's norms, rotary positions and MLP in the language model; CUDA only
    checkpointing: str | None = None  # none, full, selective; None: as the argument gradient_checkpointing says
    checkpointing_gib: float | None = None  # of selective: what the layers' activations may take; None: no limit
    projector_learning_rate: float | None = None  # None: the stage's learning rate
    tower_learning_rate: float | None = None
    encoder_learning_rate: float | None = None  # of the student, when merging
    starts_from: str = "parts"  # or checkpoint: the model that --pretrained names, whatever the preset's parts are
    lora: LoraPreset | None = None
    quantization: QuantizationPreset | None = None  # of the language model, where it is frozen but for adapters
    merge: MergePreset | None = None
    deepspeed: str | None = None  # name of a file in train/deepspeed, or a path
    arguments: dict[str, Any] = field(default_factory=dict)  # transformers.TrainingArguments

    @property
    def kept(self) -> str:
        """What the layers keep for the backward pass (:mod:`tove_llava.train.recomputation`)."""
        old, new = (self.arguments.get(f"{word}_checkpointing") for word in ("gradient", "activation"))
        return self.checkpointing or ("full" if (old if new is None else new) else "none")


@dataclass
class Preset:
    """A whole preset; :func:`load_preset` reads and checks one."""

    name: str
    vision: VisionPreset
    language: LanguagePreset
    projector: ProjectorPreset
    stages: dict[str, StagePreset]
    description: str = ""

    def stage(self, name: str) -> StagePreset:
        """The settings of one stage.

        Raises:
            ConfigError: the preset has no such stage.
        """
        if name not in self.stages:
            raise ConfigError(f"preset {self.name!r} has no stage {name!r}{_near(name, self.stages)}")
        return self.stages[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a run's record."""
        return asdict(self)


def preset_names() -> list[str]:
    """The presets of this package."""
    return sorted(path.stem for path in _HERE.glob("*.yaml"))


def load_preset(name_or_path: str, overrides: Sequence[str] = ()) -> Preset:
    """Reads a preset.

    Args:
        name_or_path: one of :func:`preset_names`, or the path of a ``.yaml`` file.
        overrides: ``key.path=value`` strings; values are YAML.

    Raises:
        ConfigError: no such preset, an unknown key (near matches are named), or a value of the wrong type.
    """
    data = _read(name_or_path, seen=())
    for override in overrides:
        _override(data, override)
    return _preset(data, name_or_path)


def _read(name_or_path: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in preset_names():
            raise ConfigError(
                f"unknown preset {name_or_path!r}{_near(name_or_path, preset_names())}; or give a .yaml file"
            )
        path = _HERE / f"{name_or_path}.yaml"
    elif not path.is_file():
        raise ConfigError(f"preset file {name_or_path} does not exist")
    if str(path) in seen:
        raise ConfigError(f"preset {name_or_path}: extends itself, by way of {' -> '.join(seen)}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"preset {path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"preset {path}: expected a mapping of keys, got {type(data).__name__}")
    base = data.pop("extends", None)
    if base is None:
        return {"name": path.stem, **data}
    return _merge(_read(base, (*seen, str(path))), {"name": path.stem, **data})


def _merge(base: dict[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} is not of the form key.path=value, such as vision.top_k=2")
    *parents, last = path.strip().split(".")
    node: Any = data
    for key in parents:
        if isinstance(node, list):
            named = {item["name"]: item for item in node if isinstance(item, dict) and "name" in item}
            if key not in named:
                raise ConfigError(f"override {override!r}: no entry named {key!r}{_near(key, named)}")
            node = named[key]
        else:
            if node.get(key) is None:
                node[key] = {}  # an unknown key is reported, with near matches, when the preset is checked
            node = node[key]
    if not isinstance(node, dict):
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} is not a mapping")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _preset(data: dict[str, Any], where: str) -> Preset:
    stages = data.get("stages", {})
    if not isinstance(stages, dict):
        raise ConfigError(f"preset {where}: stages must be a mapping from stage name to settings")
    built: dict[str, StagePreset] = {}
    for name, settings in stages.items():
        place = f"preset {where}: stages.{name}"
        settings = dict(_mapping(settings, place))
        if settings.get("lora") is not None:
            settings["lora"] = _build(LoraPreset, settings["lora"], f"{place}.lora")
        if settings.get("quantization") is not None:
            settings["quantization"] = _build(QuantizationPreset, settings["quantization"], f"{place}.quantization")
        if settings.get("merge") is not None:
            merge = dict(_mapping(settings["merge"], f"{place}.merge"))
            if merge.get("lora") is not None:
                merge["lora"] = _build(LoraPreset, merge["lora"], f"{place}.merge.lora")
            settings["merge"] = _build(MergePreset, merge, f"{place}.merge")
        built[name] = _build(StagePreset, settings, place)
    parts = {
        "vision": _build(VisionPreset, data.get("vision"), f"preset {where}: vision"),
        "language": _build(LanguagePreset, data.get("language"), f"preset {where}: language"),
        "projector": _build(ProjectorPreset, data.get("projector", {}), f"preset {where}: projector"),
        "stages": built,
    }
    return _build(Preset, {**data, **parts}, f"preset {where}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys, got {value!r}")
    return value


def _build(cls: type[T], value: Any, where: str) -> T:
    value = _mapping(value, where)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key, given in value.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{_near(str(key), known)}")
        _check_type(known[key].type, given, f"{where}.{key}")
    try:
        return cls(**value)
    except TypeError as error:
        raise ConfigError(f"{where}: {str(error).partition('__init__() ')[2] or error}") from error


def _check_type(annotation: Any, value: Any, where: str) -> None:
    """Checks the scalar types; YAML reads ``1e-3`` (no dot) as a string, which must not pass for a number."""
    kinds: dict[Any, tuple[type, bool]] = {kind: (kind, False) for kind in (float, int, str, bool)}
    kinds |= {kind | None: (kind, True) for kind in (float, int, str, bool)}
    if annotation not in kinds:
        return
    kind, optional = kinds[annotation]
    if value is None and optional:
        return
    accepted = isinstance(value, int | float if kind is float else kind)
    if not accepted or (isinstance(value, bool) and kind is not bool):
        hint = " (YAML wants a dot in 1.0e-3)" if kind is float else ""
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}{hint}")


def _near(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f". Did you mean {near[0]!r}?" if near else "."
    return f"{hint} Known: {', '.join(known)}"
