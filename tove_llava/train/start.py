"""Make the model that a stage starts from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import LlavaProcessor

from tove_llava.checkpoints.loading import load_model, load_processor, load_trained, read_config
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.checkpoints.weight_fingerprints import sampled_fingerprint
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.registry import Registry
from tove_llava.core.sources import Source
from tove_llava.data import get_template
from tove_llava.llava.build import (
    assemble,
    fit_to_processor,
    language_model_of,
    prepare_processor,
    read_language_model,
    read_tokenizer,
    vision_config,
)
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration
from tove_llava.llava.processing import build_processor
from tove_llava.llava.quantization import quantize
from tove_llava.presets import LanguagePreset, Preset, QuantizationPreset, StagePreset
from tove_llava.tower import ToveVisionConfig


class Start(Protocol):
    """A model to be made, and the facts about it."""

    stage: StagePreset  # adapted to the model
    vision: ToveVisionConfig
    processor: LlavaProcessor  # with the stage's template
    language: dict[str, Any]  # the language model's entry in the stage's checkpoint
    language_fingerprint: str  # of its weights before training and quantisation; set by model()
    quantization: QuantizationPreset | None  # of its frozen weights, from this stage or an earlier one

    def model(self, seed: int, device: torch.device | None = None) -> ToveLlavaForConditionalGeneration:
        """Make the model, on the CPU; quantised weights go to ``device``."""


MakeStart = Any  # callable: (preset, stage, folder of --pretrained or None) -> Start
STARTS: Registry[MakeStart] = Registry("kind of start (stages.NAME.starts_from)")


@STARTS.register("parts")
@dataclass
class FromParts:
    """The preset's parts, with trained parts of ``folder`` if given."""

    preset: Preset
    stage: StagePreset
    folder: Path | None

    def __post_init__(self) -> None:
        self.vision = vision_config(self.preset.vision)
        self.processor = prepare_processor(self.preset, self.vision, self.stage.template)
        language = self.preset.to_dict()["language"]
        self.language = language | {"source": str(Source.parse(language["source"]).absolute())}
        self.language_fingerprint = ""
        self.quantization = self.stage.quantization

    def model(self, seed: int, device: torch.device | None = None) -> ToveLlavaForConditionalGeneration:
        language = read_language_model(self.preset.language)
        self.language_fingerprint = sampled_fingerprint(language)
        model = assemble(language, self.vision, self.preset.projector, seed=seed)
        fit_to_processor(model, self.processor)
        if self.quantization is not None:
            quantize(model, self.quantization, compute_dtype=model.dtype, device=device)
        model.tower.load_backbones()
        if self.folder is not None:
            load_trained(model, self.folder)
        return model


@STARTS.register("checkpoint")
@dataclass
class FromCheckpoint:
    """The model of a folder, adapters included, under the stage's settings.

    Raises:
        ConfigError: no folder is given, or its language model is quantised in another way than the stage's.
        CheckpointError: it is not a checkpoint.
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
        self.language_fingerprint = manifest.language_fingerprint
        self.quantization = self._agreed(manifest.trained_quantization)
        tokenizer = load_processor(self.folder).tokenizer
        if manifest.template != self.stage.template:
            tokenizer.chat_template = self._own_chat_template()  # the folder's is that of the other template
            language = LanguagePreset(**self.language)
            get_template(self.stage.template).prepare(tokenizer, language.reasoning, language.date)
        image_token = tokenizer.convert_ids_to_tokens(config.image_token_index)
        self.processor = build_processor(
            tokenizer,
            self.vision,
            image_token=image_token,
            template=self.stage.template,
            image_aspect_ratio=self.stage.image_aspect_ratio,
        )
        if manifest.kind == "full":  # its language model has no source that adapters could refer to
            self.stage = dataclasses.replace(self.stage, lora=None)

    def _own_chat_template(self) -> str | None:
        """Return the chat template of the language model's own tokenizer."""
        try:
            return read_tokenizer(LanguagePreset(**self.language)).chat_template
        except CheckpointError:
            return None

    def _agreed(self, there: QuantizationPreset | None) -> QuantizationPreset | None:
        """Return the quantisation of the folder's parts, else the stage's."""
        wanted = self.stage.quantization
        if there is not None and wanted is not None and not there.same_weights(wanted):
            raise ConfigError(
                f"{self.folder} was trained over a language model in {there}; in {wanted} its weights would differ. "
                "Give --bits, --quant_type and --double_quant as there, or --bits 16, which holds the same weights in "
                "full precision"
            )
        return there or wanted

    def model(self, seed: int, device: torch.device | None = None) -> ToveLlavaForConditionalGeneration:
        assert self.folder is not None
        quantized = self.stage.quantization
        model, _ = load_model(self.folder, quantization=quantized, device=None if quantized is None else device)
        return self._continued(model)

    def _continued(self, model: ToveLlavaForConditionalGeneration) -> ToveLlavaForConditionalGeneration:
        """Give the loaded model the stage's template and absolute sources."""
        assert self.folder is not None
        model.tower.config.anchor(self.folder)
        model.config.conversation_template = self.processor.conversation_template
        return model


@STARTS.register("model")
@dataclass
class FromModel(FromCheckpoint):
    """A whole model, to whose folder adapters will refer."""

    def __post_init__(self) -> None:
        stage = self.stage
        super().__post_init__()
        assert self.folder is not None
        self.stage = stage
        self.language |= {"source": f"hf:{self.folder.resolve()}", "revision": None}
        self.quantization = stage.quantization

    def model(self, seed: int, device: torch.device | None = None) -> ToveLlavaForConditionalGeneration:
        assert self.folder is not None
        model, _ = load_model(self.folder)
        self.language_fingerprint = sampled_fingerprint(language_model_of(model))
        if self.quantization is not None:
            quantize(model, self.quantization, compute_dtype=model.dtype, device=device)
        return self._continued(model)


def make_start(preset: Preset, stage: StagePreset, folder: Path | None) -> Start:
    """Make a stage's start; a whole model in ``folder`` replaces the parts.

    Raises:
        ConfigError: the stage needs a folder.
        CheckpointError: the folder is not a checkpoint.
    """
    kind = stage.starts_from
    if kind == "parts" and folder is not None and Manifest.read(folder).kind == "full":
        kind = "model"
    return STARTS.get(kind)(preset, stage, folder)
