"""``llava-hf``: a folder of transformers' ``LlavaForConditionalGeneration``, such as llava-hf/llava-1.5-7b-hf.

The names of the weights changed with transformers: ``language_model.model.*`` became ``model.language_model.*``,
``vision_tower.vision_model.*`` became ``model.vision_tower.*``. All of them are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig

from tove_llava.checkpoints.assemble import assemble_model, load_clip_of, load_language, tower_config
from tove_llava.checkpoints.base import LlavaFormat, Request, register_format
from tove_llava.checkpoints.clip import fetch_clip, read_normalisation
from tove_llava.checkpoints.exports import ExportSource
from tove_llava.checkpoints.formats.stock_llava import stock_model, write_stock
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.checkpoints.parts import ClipPart, LanguagePart, LlavaParts, TowerPart, parse_source
from tove_llava.checkpoints.tensors import Tensors, folder_tensors, split_by_prefix
from tove_llava.checkpoints.tokenizer_files import add_sentencepiece, read_tokenizer
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.safe_loading import from_pretrained

_TABLE = (
    ("model.language_model.", "language", "model."),
    ("language_model.model.", "language", "model."),
    ("language_model.lm_head.", "language", "lm_head."),
    ("lm_head.", "language", "lm_head."),
    ("model.vision_tower.vision_model.", "clip", ""),
    ("vision_tower.vision_model.", "clip", ""),
    ("model.vision_tower.", "clip", ""),
    ("vision_tower.", "clip", ""),
    ("model.multi_modal_projector.", "projector", ""),
    ("multi_modal_projector.", "projector", ""),
)


@register_format("llava-hf")
class LlavaHf(LlavaFormat):
    """A folder of transformers' ``LlavaForConditionalGeneration``."""

    summary = "transformers' LlavaForConditionalGeneration"

    def detect(self, folder: Path, config: dict[str, Any]) -> bool:
        return config.get("model_type") == "llava" and "mm_vision_tower" not in config

    def read(self, folder: Path, request: Request) -> LlavaParts:
        if request.base is not None:
            raise ConfigError(f"{folder} holds a whole model; --base is for folders without a language model")
        raw = read_json_object(folder / "config.json")
        config = _config(raw, folder)
        found = split_by_prefix(folder_tensors(folder), _TABLE, folder)
        language = LanguagePart.by_value(folder, found["language"], config.text_config)
        tokenizer = read_tokenizer(language, folder)
        return LlavaParts(
            folder=folder,
            language=language,
            projector=found["projector"],
            clip=_clip(config, found["clip"], folder, request),
            tokenizer=tokenizer,
            image_token=_image_token(config, tokenizer, folder),
            template=request.template or raw.get("conversation_template") or "v1",
            image_aspect_ratio=_aspect_ratio(raw, folder),
            projector_act=config.projector_hidden_act,
        )

    def read_tower(self, folder: Path, request: Request) -> TowerPart:
        raw = read_json_object(folder / "config.json")
        found = split_by_prefix(folder_tensors(folder), _TABLE, folder)
        return TowerPart(_clip(_config(raw, folder), found["clip"], folder, request), _aspect_ratio(raw, folder))

    def write(self, parts: LlavaParts, folder: Path, request: Request) -> None:
        clip = fetch_clip(parts.clip)
        parts.clip = clip
        vision = tower_config(clip, parts.folder, clip_source=clip.source or f"hf:{parts.folder}")
        language = load_language(parts.language, parts.language.dtype)
        model, processor = assemble_model(parts, vision, language, merge_lora=True)
        load_clip_of(clip, model.tower)
        manifest = Manifest(
            kind="full",
            stage="converted",
            preset=parts.folder.name,
            template=parts.template,
            image_aspect_ratio=parts.image_aspect_ratio,
            model_max_length=parts.model_max_length,
            language={"source": parts.language.source or f"hf:{parts.folder}"},
        )
        source = ExportSource(parts.folder, model.eval(), processor, manifest, remarks=parts.remarks)
        stock = stock_model(source)
        assert clip.tensors is not None
        # All of CLIP, with the blocks and the norm that LLaVA does not use.
        stock.model.vision_tower = from_pretrained(
            CLIPVisionModel, None, "CLIP", config=clip.config, state_dict=dict(clip.tensors), dtype=model.dtype
        )
        stock.config.vision_config, stock.config.vision_feature_layer = clip.config, clip.layer
        stored = {f"model.vision_tower.{name}": value for name, value in clip.tensors.items()}
        stored |= {f"model.multi_modal_projector.{name}": value for name, value in parts.projector.items()}
        write_stock(source, stock.eval(), folder, stored)
        add_sentencepiece(parts, processor.tokenizer, folder)


def _config(raw: dict[str, Any], folder: Path) -> LlavaConfig:
    """Read the configuration, which has to be a LLaVA-1.5's."""
    vision = raw.get("vision_config")
    kind = vision.get("model_type", "clip_vision_model") if isinstance(vision, dict) else "clip_vision_model"
    if kind != "clip_vision_model":
        raise ConfigError(f"{folder}: its vision tower is a {kind!r}; only CLIP can be taken over")
    if raw.get("quantization_config"):
        raise ConfigError(f"{folder}: quantised weights cannot be converted; take the checkpoint in 16 bits")
    try:
        config = LlavaConfig.from_dict(raw)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json does not describe a LLaVA: {error}") from error
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if isinstance(layer, list) and len(layer) == 1:
        config.vision_feature_layer = layer[0]
    elif not isinstance(layer, int):
        raise ConfigError(f"{folder}: vision_feature_layer {layer}: only models that read one layer can be taken over")
    if strategy != "default":
        raise ConfigError(
            f"{folder}: with vision_feature_select_strategy {strategy!r} the projector also reads CLIP's class token, "
            "which a ToVE tower has not; only 'default' can be taken over"
        )
    assert isinstance(config.vision_config, CLIPVisionConfig)
    return config


def _clip(config: LlavaConfig, tensors: Tensors, folder: Path, request: Request) -> ClipPart:
    return ClipPart(
        config=config.vision_config,
        layer=config.vision_feature_layer,
        tensors=tensors,
        source=parse_source(request.clip) if request.clip is not None else "",
        normalisation=read_normalisation(folder),
    )


def _image_token(config: LlavaConfig, tokenizer: Any, folder: Path) -> str:
    index = config.image_token_index
    added = tokenizer.added_tokens_decoder.get(index)
    if added is None or index >= config.text_config.vocab_size:
        there = tokenizer.convert_ids_to_tokens(index) if 0 <= index < len(tokenizer) else None
        found = "no such token" if there is None else f"{there!r} there"
        raise CheckpointError(
            f"{folder}: config.json says that token {index} is the image token, but the tokenizer has {found}; the "
            "tokenizer is not this model's"
        )
    return str(added.content)


def _aspect_ratio(raw: dict[str, Any], folder: Path) -> str:
    """Return how images were shown: an export records it, else LLaVA-1.5's."""
    named = raw.get("image_aspect_ratio")
    if named in ("pad", "square"):
        return str(named)
    file = folder / "preprocessor_config.json"
    pads = read_json_object(file).get("do_pad") if file.is_file() else None
    return "square" if pads is False else "pad"
