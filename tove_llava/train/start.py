"""What a stage starts from: the preset's parts, or a checkpoint that is a whole model already."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import LlavaProcessor

from tove_llava.errors import CheckpointError, ConfigError
from tove_llava.llava.build import (
    assemble,
    fit_to_processor,
    prepare_processor,
    read_language_model,
    read_tokenizer,
    vision_config,
)
from tove_llava.llava.checkpoint import Manifest, load_model, load_processor, load_trained, read_config
from tove_llava.llava.fingerprints import fingerprint
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration
from tove_llava.llava.processing import build_processor
from tove_llava.presets import LanguagePreset, Preset, StagePreset
from tove_llava.registry import Registry
from tove_llava.sources import Source
from tove_llava.tower import ToveVisionConfig


class Start(Protocol):
    """
    Attributes:
        stage: the stage's settings, adapted to what it starts from.
        vision: the tower's configuration.
        processor: with the stage's template.
        language: the language model's entry in the checkpoint that the stage will write.
        language_fingerprint: of its weights before any training; known once the model is made.
    """

    stage: StagePreset
    vision: ToveVisionConfig
    processor: LlavaProcessor
    language: dict[str, Any]
    language_fingerprint: str

    def model(self, seed: int) -> ToveLlavaForConditionalGeneration:
        """The model with its frozen backbones, on the CPU."""


MakeStart = Any  # callable: (preset, stage, folder of --pretrained or None) -> Start
STARTS: Registry[MakeStart] = Registry("kind of start (stages.NAME.starts_from)")


@STARTS.register("parts")
@dataclass
class FromParts:
    """The preset's CLIP, experts and language model; projector and gate new, or of an earlier stage's folder."""

    preset: Preset
    stage: StagePreset
    folder: Path | None

    def __post_init__(self) -> None:
        self.vision = vision_config(self.preset.vision)
        self.processor = prepare_processor(self.preset, self.vision, self.stage.template)
        language = self.preset.to_dict()["language"]
        self.language = language | {"source": str(Source.parse(language["source"]).absolute())}
        self.language_fingerprint = ""

    def model(self, seed: int) -> ToveLlavaForConditionalGeneration:
        language = read_language_model(self.preset.language)
        self.language_fingerprint = fingerprint(language)
        model = assemble(language, self.vision, self.preset.projector, seed=seed)
        fit_to_processor(model, self.processor)
        model.tower.load_backbones()
        if self.folder is not None:
            load_trained(model, self.folder)
        return model


@STARTS.register("checkpoint")
@dataclass
class FromCheckpoint:
    """Whatever model a folder holds, adapters included; of the preset only the stage's settings are used.

    Raises:
        ConfigError: no folder is given. CheckpointError: it is not a checkpoint.
    """

    preset: Preset
    stage: StagePreset
    folder: Path | None

    def __post_init__(self) -> None:
        if self.folder is None:
            raise ConfigError("this stage starts from a trained model: give its folder with --pretrained")
        manifest = Manifest.read(self.folder)
        config = read_config(self.folder)
        self.vision = config.vision_config
        self.vision.anchor(self.folder)
        source = Source.parse(manifest.language["source"]).resolve(self.folder)
        self.language = manifest.language | {"source": str(source.absolute())}
        tokenizer = load_processor(self.folder).tokenizer
        if manifest.template != self.stage.template:
            tokenizer.chat_template = self._own_chat_template()  # the folder has the other template's form
        image_token = tokenizer.convert_ids_to_tokens(config.image_token_index)
        self.processor = build_processor(tokenizer, self.vision, image_token=image_token, template=self.stage.template)
        self.language_fingerprint = manifest.language_fingerprint
        if manifest.kind == "full":  # its language model has no source of its own that adapters could refer to
            self.stage = dataclasses.replace(self.stage, lora=None)

    def _own_chat_template(self) -> str | None:
        """What the language model's own tokenizer ships; None where its source has no tokenizer."""
        try:
            return read_tokenizer(LanguagePreset(**self.language)).chat_template
        except CheckpointError:
            return None

    def model(self, seed: int) -> ToveLlavaForConditionalGeneration:
        assert self.folder is not None
        model, _ = load_model(self.folder)
        model.tower.config.anchor(self.folder)  # what this stage writes lies elsewhere
        model.config.conversation_template = self.processor.conversation_template
        return model
