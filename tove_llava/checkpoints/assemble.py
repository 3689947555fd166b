"""Assemble a model that runs from a LLaVA's parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlavaProcessor, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tove_llava.checkpoints.parts import ClipPart, LanguagePart, LlavaParts
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.safe_loading import from_pretrained
from tove_llava.llava.adapters import add_adapters
from tove_llava.llava.build import assemble, fit_to_processor, read_language_model, torch_dtype, tower_keys
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration
from tove_llava.llava.processing import build_processor
from tove_llava.presets import LanguagePreset, Preset, ProjectorPreset
from tove_llava.tower import ToveVisionConfig, ToveVisionModel
from tove_llava.tower.frozen import load_clip

LANGUAGE_PATH = "model.language_model."  # prefix of the language model's layers in a ToVE-LLaVA
PROJECTOR_PATH = "model.multi_modal_projector."


def tower_config(
    clip: ClipPart, folder: Path, preset: Preset | None = None, clip_source: str | None = None
) -> ToveVisionConfig:
    """Configure a tower of CLIP and any experts of ``preset``.

    Args:
        folder: the LLaVA's, for messages.
        clip_source: where CLIP will be; the part's source by default.
    """
    keys: dict[str, Any] = {"fusion": "none"}
    experts: list[Any] = []
    if preset is not None:
        from tove_llava.experts import complete_specs

        keys, experts = tower_keys(preset.vision), list(complete_specs(preset.vision.experts))
        for key, own in (("clip_layer", clip.layer), ("image_size", clip.config.image_size)):
            wanted = keys.pop(key)
            if wanted not in (own, None):
                raise ConfigError(
                    f"preset {preset.name!r} has vision.{key}={wanted}, but {folder} was trained with {own}: its "
                    f"logits would change. Add --set vision.{key}={own}"
                )
    config = ToveVisionConfig(
        clip_config=clip.config.to_dict(),
        clip_source=clip.source if clip_source is None else clip_source,
        clip_revision=clip.revision if clip_source is None else None,
        clip_layer=clip.layer,
        experts=experts,
        **keys,
        **clip.normalisation,
    )
    if config.hidden_size != clip.config.hidden_size:
        raise ConfigError(
            f"fusion {config.fusion!r} gives tokens of width {config.hidden_size}, and the projector of {folder} "
            f"reads {clip.config.hidden_size}; choose one that keeps CLIP's width: --set vision.fusion=tove"
        )
    return config


def assemble_model(
    parts: LlavaParts,
    vision: ToveVisionConfig,
    language: PreTrainedModel,
    *,
    merge_lora: bool = False,
    seed: int = 42,
) -> tuple[ToveLlavaForConditionalGeneration, LlavaProcessor]:
    """Assemble model and processor; CLIP and experts are not loaded yet.

    Args:
        vision: the tower's configuration; its own parameters are new.
        language: from :func:`load_language`.
        merge_lora: fold adapters into the language model's weights.
    """
    processor = build_processor(
        copy.deepcopy(parts.tokenizer),
        vision,
        image_token=parts.image_token,
        template=parts.template,
        image_aspect_ratio=parts.image_aspect_ratio,
    )
    model = assemble(language, vision, ProjectorPreset(parts.projector_act, parts.has_bias), seed=seed)
    fit_to_processor(model, processor)
    model.config.image_aspect_ratio = parts.image_aspect_ratio
    with torch.no_grad():
        for name, parameter in model.model.multi_modal_projector.named_parameters():
            parameter.copy_(parts.projector[name])
    if parts.adapter is not None:
        _add_adapters(model, parts, merge=merge_lora)
    return model, processor


def load_language(part: LanguagePart, dtype: str | torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """Load the language model, mapped from disk where the dtype stays."""
    if part.tensors is None:
        preset = LanguagePreset(part.source, part.revision, dtype=part.dtype, attention=attention)
        return read_language_model(preset, dtype)
    config = copy.deepcopy(part.config)
    model, info = from_pretrained(
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)],
        None,
        "the language model",
        config=config,
        state_dict=dict(part.tensors),
        dtype=torch_dtype(dtype),
        output_loading_info=True,
        **({"attn_implementation": attention} if attention else {}),
    )
    odd = sorted({*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]})
    if odd:
        raise CheckpointError(f"the language model's tensors are not those of its configuration: {odd[0]!r}")
    if part.generation is not None:
        model.generation_config = GenerationConfig.from_dict(part.generation)
    return model


def load_clip_of(clip: ClipPart, tower: ToveVisionModel) -> None:
    """Give the tower a CLIP that is held by value; ``load_backbones`` loads the rest."""
    if clip.tensors is not None:
        tower.frozen.clip = load_clip(tower.config, tensors=clip.tensors).to(tower.device, tower.dtype)


def _add_adapters(model: ToveLlavaForConditionalGeneration, parts: LlavaParts, *, merge: bool) -> None:
    assert parts.adapter is not None
    path = LANGUAGE_PATH.replace(".", r"\.")
    layers = rf"{path}(?:.*\.)?(?:{'|'.join(parts.adapter.layers)})"
    tensors = {LANGUAGE_PATH + name.removeprefix("model."): x for name, x in parts.adapter.tensors.items()}
    add_adapters(model, parts.adapter.settings | {"target_modules": layers}, tensors, parts.folder, merge=merge)
