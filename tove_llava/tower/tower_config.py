"""Configuration of the vision tower, from which it is built."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, GenerationConfig, PreTrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tove_llava.core.errors import ConfigError
from tove_llava.core.mappings import check_types
from tove_llava.core.registry import Registry
from tove_llava.core.safe_loading import from_pretrained
from tove_llava.core.sources import Source
from tove_llava.experts.from_spec import complete_specs
from tove_llava.experts.spec import ExpertSpec

#: subclasses of :class:`tove_llava.tower.fusion.Fusion` by name; it lives here because a configuration asks for sizes
FUSIONS: Registry[Any] = Registry("fusion", package="tove_llava.tower.fusion")
#: subclasses of :class:`tove_llava.tower.gate.Gate` by name; they lie with the fusions that use them
GATES: Registry[Any] = Registry("gate", package="tove_llava.tower.fusion")

# Keys that transformers adds to a config.json or passes while loading one.
_LIBRARY_KEYS = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
}


@strict
class ToveVisionConfig(PreTrainedConfig):
    r"""Configuration of a tower, its sources included.

    Args:
        clip_config: the whole CLIP vision encoder, as its source describes it (all layers).
        clip_source: of CLIP's weights, e.g. ``hf:openai/clip-vit-large-patch14-336``.
        clip_revision: commit, branch or tag of ``clip_source``.
        clip_layer: index into CLIP's hidden states of the tokens used; -2 as in LLaVA. Later layers are never built.
        image_size: pixels per side of ``pixel_values``; CLIP's own by default, else a multiple of the grid's side.
        image_mean, image_std: normalisation of ``pixel_values``; undone before the experts.
        experts: one :class:`~tove_llava.experts.base.ExpertSpec` (as a dict) per expert, width and grid filled in.
        fusion: registered name of the trainable part.
        fusion_options: keyword arguments of that part; an unknown one is an error.
        projection_dim: width ``m`` of the projected expert knowledge; CLIP's width by default.
        noisy_gating: noise on the gate's logits in training, and the load term of the balance loss with it.
        top_k: keep only the k largest gate logits of each token; None keeps all.
        null_slot: one more gate column, which receives nothing.
        router_aux_loss_coef: weight of the balance loss.
        detached_experts: names of experts that are taken out.

    ``hidden_size``, ``num_image_tokens``, ``grid``, ``num_patches`` and ``patch_size`` are derived and read-only.

    Raises:
        ConfigError: an unknown key, or values that contradict each other.

    Example:
        >>> edge = {"name": "edge", "source": "bundled:edge"}
        >>> config = tove_llava.ToveVisionConfig.from_sources("bundled:clip", [edge])
        >>> config.num_patches, config.clip_width, config.expert_specs[0].grid
        (36, 192, (3, 3))
    """

    model_type = "tove_vision"
    base_config_key = "vision_config"
    sub_configs_defaults = {"clip_config": CLIPVisionConfig}

    clip_config: Any = None  # a dict or None becomes a CLIPVisionConfig
    clip_source: str = ""
    clip_revision: str | None = None
    clip_layer: int = -2
    image_size: Any = None  # int once built
    image_mean: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_STD)
    experts: list[Any] | tuple[Any, ...] = ()
    fusion: str = "tove"
    fusion_options: dict[str, Any] | None = None
    projection_dim: Any = None  # int once built
    noisy_gating: bool = True
    top_k: int | None = None
    null_slot: bool = False
    router_aux_loss_coef: float = 0.01
    detached_experts: list[str] | tuple[str, ...] = ()

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = set(kwargs) - _library_keys()
        if unknown:
            raise ConfigError(
                f"unknown key(s) in the vision tower's configuration: {', '.join(sorted(unknown))}. "
                f"Known keys: {', '.join(sorted(f.name for f in dataclasses.fields(ToveVisionConfig)))}"
            )
        check_types(ToveVisionConfig, vars(self), "the vision tower's configuration")
        super().__post_init__(**kwargs)
        if not isinstance(self.clip_config, CLIPVisionConfig):
            try:
                self.clip_config = CLIPVisionConfig(**(self.clip_config or {}))
            except Exception as error:  # impossible values raise errors of many kinds
                raise ConfigError(f"the vision tower's configuration: clip_config is no CLIP's: {error!r}") from error
        self.experts = [_as_dict(entry) for entry in self.experts]
        self.detached_experts = list(self.detached_experts)
        self.fusion_options = dict(self.fusion_options or {})
        if self.image_size is None:
            self.image_size = self.clip_config.image_size
        if self.projection_dim is None:
            self.projection_dim = self.clip_width
        self._check()

    @classmethod
    def from_sources(
        cls,
        clip_source: str,
        experts: Sequence[Any] = (),
        *,
        clip_revision: str | None = None,
        base_dir: str | os.PathLike[str] | None = None,
        **keys: Any,
    ) -> ToveVisionConfig:
        """Read CLIP's configuration and the experts' sizes; load no weights.

        Args:
            clip_source: ``hf:<repository or folder>`` or ``bundled:<name>``.
            experts: :class:`~tove_llava.experts.spec.ExpertSpec` objects or their dicts.
            base_dir: folder of sources such as ``hf:./clip``.
            keys: any other key of the configuration.

        Raises:
            ConfigError: a wrong source, expert or key. CheckpointError: a missing source.
        """
        source = Source.parse(clip_source).resolve(base_dir)
        revision = clip_revision or "main"
        clip_config = from_pretrained(CLIPVisionConfig, source, "CLIP's configuration", revision=revision)
        return cls(
            clip_config=clip_config,
            clip_source=clip_source,
            clip_revision=clip_revision,
            experts=complete_specs(list(experts), None if base_dir is None else Path(base_dir)),
            **keys,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return only the known keys; a reader refuses any other."""
        known = {field.name for field in dataclasses.fields(self)} | _library_keys()
        return {key: value for key, value in super().to_dict().items() if key in known}

    def anchor(self, base_dir: str | os.PathLike[str]) -> None:
        """Make sources absolute that are relative to the checkpoint ``base_dir``."""

        def outside(source: str) -> str:
            return str(Source.parse(source).resolve(base_dir).absolute()) if source else source

        self.clip_source = outside(self.clip_source)
        self.experts = [entry | {"source": outside(entry.get("source", ""))} for entry in self.experts]

    def _check(self) -> None:
        clip = self.clip_config
        sizes = (clip.image_size, clip.patch_size, clip.hidden_size)
        if not all(isinstance(size, int) and size > 0 for size in sizes) or clip.patch_size > clip.image_size:
            raise ConfigError(
                "the tower needs a CLIP with square images and patches: image_size and patch_size integers above 0"
            )
        for key in ("image_size", "projection_dim"):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)!r} must be a positive integer")
        if self.image_size % self.grid:
            raise ConfigError(
                f"image_size={self.image_size} is not a multiple of the token grid's side {self.grid}; "
                f"the nearest that is: {max(1, round(self.image_size / self.grid)) * self.grid}"
            )
        if not 1 <= self.num_clip_layers <= clip.num_hidden_layers:
            raise ConfigError(
                f"clip_layer={self.clip_layer} names no layer of this CLIP, which has {clip.num_hidden_layers}"
            )
        names = self.expert_names
        bad = [name for name in names if not name.isidentifier()]
        if bad:
            raise ConfigError(f"expert names must be identifiers (letters, digits, underscores), not {bad}")
        if len(set(names)) != len(names):
            raise ConfigError(f"expert names must be unique within a tower, got {names}")
        self.check_expert_names(self.detached_experts)
        slots = len(names) + self.null_slot
        if self.top_k is not None and not 1 <= self.top_k <= max(slots, 1):
            raise ConfigError(f"top_k={self.top_k} must lie between 1 and the number of gate columns, {slots}")
        if self.router_aux_loss_coef < 0:
            raise ConfigError(f"router_aux_loss_coef={self.router_aux_loss_coef} must not be negative")

    def check_expert_names(self, names: Iterable[str]) -> None:
        """Raise ConfigError for a name that is no expert's."""
        unknown = [name for name in names if name not in self.expert_names]
        if unknown:
            raise ConfigError(f"unknown expert(s) {unknown}; this tower has: {', '.join(self.expert_names) or 'none'}")

    @property
    def expert_names(self) -> list[str]:
        """List all experts, in the order of the gate's columns."""
        return [entry["name"] for entry in self.experts]

    @property
    def attached_experts(self) -> list[str]:
        """List the attached experts, in the order of the gate's columns."""
        return [name for name in self.expert_names if name not in self.detached_experts]

    @property
    def expert_specs(self) -> list[ExpertSpec]:
        return [ExpertSpec.from_dict(entry) for entry in self.experts]

    @property
    def lies_in_checkpoint(self) -> bool:
        """Tell if the checkpoint's folder holds the backbones."""
        return any(source.is_relative for source in self._sources())

    @property
    def is_portable(self) -> bool:
        """Tell if no source is a folder of this machine."""
        return all(source.is_portable for source in self._sources())

    def _sources(self) -> list[Source]:
        return [Source.parse(s) for s in (self.clip_source, *(e.get("source", "") for e in self.experts)) if s]

    @property
    def num_clip_layers(self) -> int:
        """Count CLIP's layers that are built."""
        if self.clip_layer < 0:
            return self.clip_config.num_hidden_layers + 1 + self.clip_layer
        return self.clip_layer

    @property
    def clip_width(self) -> int:
        """Return the width d of CLIP's tokens."""
        return self.clip_config.hidden_size

    @property
    def hidden_size(self) -> int:
        """Return the projector's input width: d, unless the fusion changes it."""
        return FUSIONS.get(self.fusion).output_width(self)

    @property
    def num_image_tokens(self) -> int:
        """Return tokens per image for the language model: N, or more."""
        return FUSIONS.get(self.fusion).num_tokens(self)

    @property
    def grid(self) -> int:
        """Return the vision tokens per side."""
        return self.clip_config.image_size // self.clip_config.patch_size

    @property
    def num_patches(self) -> int:
        """Return N, CLIP's patch tokens per image."""
        return self.grid**2

    @property
    def patch_size(self) -> int:
        """Return pixels per token side, for LLaVA's processor."""
        return self.image_size // self.grid

    @property
    def num_channels(self) -> int:
        return self.clip_config.num_channels


def _library_keys() -> set[str]:
    return _LIBRARY_KEYS | set(GenerationConfig._get_default_generation_params())


def _as_dict(entry: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(entry) and not isinstance(entry, type):
        entry = dataclasses.asdict(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ConfigError(f"an expert's entry is a mapping with at least a 'name', got {entry!r}")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in entry.items()}
