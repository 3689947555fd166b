"""Read a preset: a model's parts and its stages' settings.

``extends: NAME`` starts from another preset; mappings are merged, lists and values replaced. ``key.path=value``
overrides a key; an entry of ``vision.experts`` is addressed by its name: ``vision.experts.depth.mode=features``, and
``vision.experts=[depth, edge]`` keeps the entries of these names.
``plugins`` lists files that register parts of your own (:mod:`tove_llava.core.plugins`), relative to the preset's
folder; a preset that extends another loads the plugins of both.

A field with a help text is also a flag of ``tove-llava train`` (:mod:`tove_llava.train.arguments`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tove_llava.core.errors import ConfigError
from tove_llava.core.files import read_text
from tove_llava.core.mappings import from_mapping, merged, override_key, parse_yaml
from tove_llava.core.plugins import add_plugins, file_plugins
from tove_llava.core.registry import closest

FOLDER = Path(__file__).parent


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class VisionPreset:
    """The tower; keys are arguments of ``ToveVisionConfig``, except ``clip`` and ``clip_config``."""

    clip: str
    clip_revision: str | None = None
    clip_config: dict[str, Any] | None = None  # architecture of a source that is out of reach
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
    """The language model."""

    source: str  # of weights and tokenizer
    revision: str | None = None
    dtype: str = "float32"
    attention: str | None = None
    image_token: str = "<image>"
    tokenizer: str | None = None  # source of the tokenizer, where it is another one
    reasoning: str | None = None  # a record's think blocks, with the template chat_template: refuse, drop or keep
    date: str | None = None  # ISO date for a chat template that asks for the time
    config: dict[str, Any] | None = None  # its architecture, where the weights are out of reach


def _require(part: str, key: str, value: Any, right: bool, allowed: str) -> None:
    if not right:
        raise ConfigError(f"{part}: {key} must be {allowed}, not {value!r}")


@dataclass
class ProjectorPreset:
    """The MLP between tower and language model (LLaVA's ``mlp2x_gelu``)."""

    hidden_act: str = "gelu"
    bias: bool = True


@dataclass
class LoraPreset:
    """Low-rank adapters on the linear layers of the language model."""

    r: int = _flag(128, "rank of the adapters")
    alpha: int = _flag(256, "scale of the adapters")
    dropout: float = _flag(0.05, "dropout before the adapters")
    bias: str = "none"

    def __post_init__(self) -> None:
        _require("lora", "r", self.r, self.r >= 1, "at least 1")
        _require("lora", "alpha", self.alpha, self.alpha > 0, "above 0")
        _require("lora", "dropout", self.dropout, 0 <= self.dropout < 1, "from 0 to below 1")
        _require("lora", "bias", self.bias, self.bias in ("none", "all", "lora_only"), "none, all or lora_only")


@dataclass(frozen=True)
class QuantizationPreset:
    """Storage of the language model's frozen linear layers (:mod:`tove_llava.llava.quantization`).

    With 8 bits (LLM.int8()) the other keys mean nothing.

    Raises:
        ConfigError: another number of bits or type.
    """

    bits: int = _flag(4, "bits of the language model's frozen weights: 4, 8, or 16 (not quantised)")
    quant_type: str = _flag("nf4", "type of 4-bit weights: nf4 or fp4")
    double_quant: bool = _flag(True, "quantise the scales of 4-bit weights too")

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"quantization: bits must be 4 or 8, not {self.bits!r}; leave it out for full precision")
        _require("quantization", "quant_type", self.quant_type, self.quant_type in ("nf4", "fp4"), "nf4 or fp4")

    def __str__(self) -> str:
        if self.bits == 8:
            return "8 bits"
        return f"4 bits ({self.quant_type}{', double quantisation' if self.double_quant else ''})"

    def same_weights(self, other: "QuantizationPreset") -> bool:
        """Return True if both give the same values."""
        return self == other or self.bits == other.bits == 8


@dataclass
class MergePreset:
    """Settings with which a copy of CLIP learns the tower's tokens (:mod:`tove_llava.train.merging`)."""

    loss: str = _flag("mse", "merge loss: mse, smooth_l1 or cosine")
    coefficient: float = _flag(1.0, "weight of the merge loss")
    images_per_record: int = _flag(0, "further images that each record brings; only the merge loss sees them")
    token_weights: str = _flag(
        "uniform", "token weights in the merge loss: uniform, or transfer (by what was transferred)"
    )
    layers: list[int] | None = _flag(None, "blocks of CLIP that learn, such as 8 9 10 (default: all)")
    optimizer: str = _flag("adamw", "optimizer of the encoder's matrices: adamw, or muon (not under DeepSpeed)")
    lora: LoraPreset | None = None  # adapters on these blocks instead of their own weights

    def __post_init__(self) -> None:
        _require("merge", "coefficient", self.coefficient, 0 <= self.coefficient < math.inf, "a number from 0")
        images = self.images_per_record
        _require("merge", "images_per_record", images, images >= 0, "a number from 0")


@dataclass
class StagePreset:
    """One training stage."""

    train: str  # a registered freezing policy (tove_llava.train.stages)
    template: str = _flag(MISSING, "conversation template")
    image_aspect_ratio: str = _flag("pad", "'square' or 'pad'")
    image_placeholder: str = _flag("written", "images without <image>: 'written' refuses, 'first' puts them first")
    image_resize: str = _flag("pillow", "'pillow', or 'torch': faster, within 2 of 255 levels")
    group_by_modality_length: bool = _flag(False, "LLaVA's grouped sampling")
    model_max_length: int = _flag(2048, "longest sequence, image tokens included")
    padding_free: bool = _flag(False, "put the sequences of a batch in one row, without padding")
    tower_execution: str = _flag("eager", "how CLIP and the experts run: eager, concurrent, or compiled as well")
    fused_kernels: bool = _flag(False, "liger-kernel's norms, rotary positions and MLP in the language model (CUDA)")
    checkpointing: str | None = _flag(  # None: as the argument gradient_checkpointing says
        None, "what the layers compute again in the backward pass: none, full, selective"
    )
    checkpointing_gib: float | None = _flag(
        None, "GiB for the layers' activations under selective checkpointing (default: no limit)"
    )
    projector_learning_rate: float | None = _flag(None, "learning rate of the projector (default: the stage's)")
    tower_learning_rate: float | None = _flag(None, "learning rate of the gate and projections (default: the stage's)")
    encoder_learning_rate: float | None = _flag(None, "learning rate of the merged encoder (default: the stage's)")
    starts_from: str = "parts"  # or checkpoint: the model that --pretrained names, instead of the preset's parts
    lora: LoraPreset | None = None
    quantization: QuantizationPreset | None = None  # of a language model that is frozen except for adapters
    merge: MergePreset | None = None
    deepspeed: str | None = None  # name of a file in train/deepspeed, or a path
    arguments: dict[str, Any] = field(default_factory=dict)  # transformers.TrainingArguments

    def __post_init__(self) -> None:
        for part in ("projector", "tower", "encoder"):
            rate = getattr(self, f"{part}_learning_rate")
            _require("stage", f"{part}_learning_rate", rate, rate is None or 0 <= rate < math.inf, "a number from 0")
        _require("stage", "model_max_length", self.model_max_length, self.model_max_length >= 1, "at least 1")

    @property
    def kept(self) -> str:
        """Return the checkpointing kind: none, full or selective (:mod:`tove_llava.train.recomputation`)."""
        if self.checkpointing is not None:
            return self.checkpointing
        old, new = (self.arguments.get(f"{word}_checkpointing") for word in ("gradient", "activation"))
        kept = old if new is None else new
        return "full" if kept else "none"


@dataclass
class Preset:
    """A whole preset; :func:`load_preset` reads and checks one."""

    name: str
    vision: VisionPreset
    language: LanguagePreset
    projector: ProjectorPreset = field(default_factory=ProjectorPreset)
    stages: dict[str, StagePreset] = field(default_factory=dict)
    description: str = ""
    plugins: list[str] = field(default_factory=list)

    def stage(self, name: str) -> StagePreset:
        """Return the settings of one stage.

        Raises:
            ConfigError: the preset has no such stage.
        """
        if name not in self.stages:
            raise ConfigError(f"preset {self.name!r} has no stage {name!r}.{_near(name, self.stages)}")
        return self.stages[name]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for a run's record."""
        return asdict(self)


def dump_preset(preset: Preset) -> str:
    """Write a preset as YAML that :func:`load_preset` reads, every key included."""
    data = preset.to_dict() | {"plugins": [str(plugin.path) for plugin in file_plugins()]}  # also those of --plugin
    first = {key: data.pop(key) for key in ("name", "description")}
    return yaml.safe_dump({**first, **data}, sort_keys=False, allow_unicode=True, width=120)


def preset_names() -> list[str]:
    """List the presets of this package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name_or_path: str, overrides: Sequence[str] = ()) -> Preset:
    """Read a preset.

    Args:
        name_or_path: one of :func:`preset_names`, or the path of a ``.yaml`` file.
        overrides: ``key.path=value`` strings; values are YAML.

    Raises:
        ConfigError: no such preset, an unknown key (near matches are named), or a value of the wrong type.

    Returns:
        the preset, as dataclasses.

    Example:
        >>> preset = tove_llava.load_preset("tiny", ["vision.experts.depth.mode=features"])
        >>> preset.vision.experts[0]["mode"], preset.stages["finetune_lora"].template
        ('features', 'v1')
    """
    data = _read(name_or_path, seen=())
    for override in overrides:
        override_key(data, override)
    preset = from_mapping(Preset, data, f"preset {name_or_path}")
    if preset.plugins:
        add_plugins(preset.plugins)
    return preset


def _read(name_or_path: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in preset_names():
            raise ConfigError(f"unknown preset {name_or_path!r}.{_near(name_or_path, preset_names())}; or a .yaml file")
        path = FOLDER / f"{name_or_path}.yaml"
    elif not path.is_file():
        raise ConfigError(f"preset file {name_or_path} does not exist")
    if str(path) in seen:
        raise ConfigError(f"preset {name_or_path}: extends itself, by way of {' -> '.join(seen)}")
    data = parse_yaml(read_text(path, ConfigError), f"preset {path}")
    if not isinstance(data, dict):
        raise ConfigError(f"preset {path}: expected a mapping of keys, got {type(data).__name__}")
    base = data.pop("extends", None)
    if isinstance(data.get("plugins"), list):
        data["plugins"] = [str(path.parent / str(file)) for file in data["plugins"]]
    if base is None:
        return {"name": path.stem, **data}
    below = _read(base, (*seen, str(path)))
    if isinstance(data.get("plugins"), list):
        data["plugins"] = [*below.get("plugins", []), *data["plugins"]]
    return merged(below, {"name": path.stem, **data})


def _near(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    return f"{closest(name, known)} Known: {', '.join(sorted(known))}"
