"""A LLaVA in parts, between reading and writing formats."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from tove_llava.checkpoints.tensors import Tensors, check_tensors
from tove_llava.core.errors import CheckpointError
from tove_llava.core.files import read_json_object
from tove_llava.core.model_sizes import check_sizes
from tove_llava.core.safe_loading import loading
from tove_llava.core.sources import Source
from tove_llava.llava.adapter_settings import read_adapter_settings
from tove_llava.llava.build import language_config
from tove_llava.presets import LanguagePreset

_PLAIN_LORA = re.compile(r"model\.layers\.\d+(\.\w+)+\.lora_[AB]\.weight")
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@dataclass
class LanguagePart:
    """The language model.

    Attributes:
        config: its own; the number of tokens is its number of rows.
        dtype: of its weights, such as "float16".
        tensors: by the names of its causal-LM class; None for a language model by reference.
        source, revision: of a language model by reference.
        tokenizer_folders: possible folders of its tokenizer's files, the best first.
        generation: ``generation_config.json``.
    """

    config: PreTrainedConfig
    dtype: str
    tensors: Tensors | None = None
    source: str = ""
    revision: str | None = None
    tokenizer_folders: list[Path] = field(default_factory=list)
    generation: dict[str, Any] | None = None

    @classmethod
    def by_value(cls, folder: Path, tensors: Tensors, config: PreTrainedConfig) -> LanguagePart:
        """Return the language model that a folder holds.

        Raises:
            CheckpointError: it has no embeddings, or its generation_config.json is damaged.
        """
        if EMBEDDINGS not in tensors:
            raise CheckpointError(
                f"{folder}: the language model's {EMBEDDINGS!r} is missing; the checkpoint is incomplete"
            )
        file = folder / "generation_config.json"
        generation = read_json_object(file) if file.is_file() else None
        if generation is not None:
            with loading("the settings", file):
                GenerationConfig.from_dict(generation)
        return cls(
            config=config,
            dtype=str(tensors[EMBEDDINGS].dtype).removeprefix("torch."),
            tensors=tensors,
            tokenizer_folders=[folder],
            generation=generation,
        )

    @classmethod
    def by_reference(cls, source: str, revision: str | None = None, dtype: str | None = None) -> LanguagePart:
        """Return a language model that stays where it is.

        Args:
            dtype: for use; by default the configuration's.
        """
        config = language_config(LanguagePreset(source=source, revision=revision))
        path = Source.parse(source).path
        named = "float32" if config.dtype is None else str(config.dtype).removeprefix("torch.")
        folders = [] if path is None else [path]
        return cls(config, dtype or named, source=source, revision=revision, tokenizer_folders=folders)


@dataclass
class ClipPart:
    """The vision encoder.

    Attributes:
        layer: the hidden state that the projector reads; negative ones count from the last block.
        tensors: all of ``CLIPVisionModel``'s, by its names; None for a CLIP by reference.
        source: ``hf:...``; with ``tensors`` it is their public name, or empty.
    """

    config: CLIPVisionConfig
    layer: int
    tensors: Tensors | None = None
    source: str = ""
    revision: str | None = None
    normalisation: dict[str, list[float]] = field(default_factory=dict)  # image_mean, image_std; empty: OpenAI's

    @property
    def depth(self) -> int:
        """Return the number of blocks below the tokens that are used."""
        return self.layer if self.layer >= 0 else self.config.num_hidden_layers + 1 + self.layer


class TowerPart(NamedTuple):
    """A LLaVA-1.5's CLIP, and how images were shown, "pad" or "square"."""

    clip: ClipPart
    image_aspect_ratio: str


@dataclass
class AdapterPart:
    """LoRA adapters of the language model.

    Attributes:
        settings: of peft's ``LoraConfig``, without the names of layers.
        tensors: by the language model's names: ``model.layers.0.self_attn.q_proj.lora_A.weight``.
    """

    settings: dict[str, Any]
    tensors: Tensors

    @classmethod
    def read(cls, file: Path, tensors: Tensors, advice: str) -> AdapterPart:
        """Read the settings of plain LoRA from ``adapter_config.json``.

        Args:
            advice: what to do about adapters that are more.
        """
        settings = read_adapter_settings(file, advice, plain=True)
        odd = [name for name in tensors if not _PLAIN_LORA.fullmatch(name)]
        if odd or not tensors:
            raise CheckpointError(
                f"{file.parent}: {odd[0] if odd else 'empty'!r} is no LoRA tensor of the language model's layers"
            )
        return cls(settings, tensors)

    @property
    def layers(self) -> list[str]:
        """Return the last names of the adapted layers."""
        return sorted({name.split(".lora_")[0].rpartition(".")[2] for name in self.tensors})


@dataclass
class LlavaParts:
    """A LLaVA-1.5: CLIP, a projector of two layers, a language model.

    Attributes:
        folder: where it was read.
        projector: ``linear_1.weight``, ``linear_1.bias``, ``linear_2.weight``, ``linear_2.bias``.
        tokenizer: the language model's; it may lack the image token.
        template: registered name of the conversation template.
        image_aspect_ratio: how the model was shown images, "pad" or "square".
        remarks: facts about the conversion for its user, one sentence each.
    """

    folder: Path
    language: LanguagePart
    projector: Tensors
    clip: ClipPart
    tokenizer: PreTrainedTokenizerBase
    template: str
    image_aspect_ratio: str = "pad"
    image_token: str = "<image>"
    projector_act: str = "gelu"
    model_max_length: int = 2048
    adapter: AdapterPart | None = None
    remarks: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Compare every tensor with what the configurations ask for.

        Raises:
            CheckpointError: one is missing, too many, or of another shape.
        """
        language, clip = self.language, self.clip
        if language.tensors is not None:
            settle_tying(language, self.folder)
            self._check_sizes(language.config, language.tensors)
            model = self._on_meta(
                "language model", lambda: AutoModelForCausalLM.from_config(language.config, trust_remote_code=False)
            )
            tied = (HEAD,) if language.config.tie_word_embeddings else ()
            check_tensors(language.tensors, model, "language model", self.folder, tied)
        if clip.tensors is not None:
            self._check_sizes(clip.config, clip.tensors)
            encoder = self._on_meta("CLIP", lambda: CLIPVisionModel(clip.config))
            check_tensors(clip.tensors, encoder, "CLIP", self.folder)
        keys = {"projector_hidden_act": self.projector_act, "multimodal_projector_bias": self.has_bias}
        parts = {"vision_config": clip.config, "text_config": language.config}
        projector = self._on_meta("projector", lambda: LlavaMultiModalProjector(LlavaConfig(**parts, **keys)))
        check_tensors(self.projector, projector, "projector", self.folder)

    def _check_sizes(self, config: PreTrainedConfig, tensors: Tensors) -> None:
        shapes = {name: value.shape for name, value in tensors.items()}
        check_sizes(config.to_dict(), shapes, f"{self.folder}/config.json")

    def _on_meta(self, what: str, build: Callable[[], nn.Module]) -> nn.Module:
        try:
            with torch.device("meta"):
                return build()
        except Exception as error:  # impossible values raise errors of many kinds
            raise CheckpointError(f"{self.folder}/config.json describes no {what}: {error!r}") from error

    @property
    def has_bias(self) -> bool:
        """Return whether the projector's layers have one."""
        return any(name.endswith(".bias") for name in self.projector)


def settle_tying(language: LanguagePart, where: Path) -> None:
    """Raise CheckpointError for untied weights despite ``tie_word_embeddings``."""
    assert language.tensors is not None
    head, embeddings = language.tensors.get(HEAD), language.tensors.get(EMBEDDINGS)
    if not language.config.tie_word_embeddings or head is None or embeddings is None:
        return
    if head.shape != embeddings.shape or not torch.equal(head, embeddings):
        raise CheckpointError(f"{where}: config.json says tie_word_embeddings, but {HEAD} is not {EMBEDDINGS}; correct "
                              "config.json")  # fmt: skip


def parse_source(text: str) -> str:
    """Return a source in recorded form; a bare name is the hub's."""
    known = text.partition(":")[0] in ("hf", "bundled", "gguf")
    source = Source.parse(text if known else f"hf:{text}").absolute()
    if source.path is not None:
        source.require()
    return str(source)
