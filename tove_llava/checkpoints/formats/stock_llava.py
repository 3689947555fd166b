"""``hf-llava``: a stock ``LlavaForConditionalGeneration``, for a model whose tower is only CLIP.

The tower's CLIP, which ends at the layer whose tokens are used, becomes the vision tower with
``vision_feature_layer=-1``; projector and language model stay the same. Weights have the names of LLaVA's public
checkpoints (``language_model.model.*``, ``vision_tower.vision_model.*``), which every server reads. transformers from
5.6 on omits ``vision_model``, and vLLM cannot read that.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from tove_llava.checkpoints import exports
from tove_llava.checkpoints.base import Request, register_format
from tove_llava.checkpoints.card import STOCK_CODE, part_rows
from tove_llava.checkpoints.tensors import write_json
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.tower import FUSIONS

MAX_SHARD_SIZE = "5GB"  # memory for writing, in addition to the model
_NEUTRAL_NORM = "The norm after CLIP's last block is neutral: LLaVA reads the tokens before it."


@register_format("hf-llava")
class HfLlava(exports.ExportFormat):
    """A folder that transformers, vLLM and SGLang open as LLaVA-1.5."""

    summary = "a stock LlavaForConditionalGeneration; the tower has to be only CLIP"

    def check(self, config: Any) -> None:
        vision = config.vision_config
        if FUSIONS.get(vision.fusion).uses_experts and vision.attached_experts:
            raise ConfigError(
                f"stock LLaVA has no place for the attached expert(s) {', '.join(vision.attached_experts)}. Merge them "
                "into CLIP (tove-llava merge) or take them out (tove-llava detach), and export that; or export with "
                "--format remote-code, which keeps them"
            )

    def write(self, source: exports.ExportSource, folder: Path, request: Request) -> None:
        write_stock(source, stock_model(source), folder)


def write_stock(
    source: exports.ExportSource,
    stock: LlavaForConditionalGeneration,
    folder: Path,
    stored: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a stock LLaVA with a checkpoint's processor, template and card.

    Args:
        source: gets remarks.
        stock: made of the checkpoint's parts.
        stored: values to write instead of ``stock``'s own, by its names: the same weights in another dtype.
    """
    _add_remarks(source)
    check_tower(source, stock)
    state = {_public_name(name): value for name, value in {**stock.state_dict(), **(stored or {})}.items()}
    stock.save_pretrained(folder, state_dict=state, max_shard_size=MAX_SHARD_SIZE)
    _name_rope_as_before(folder / "config.json")
    exports.write_processor(source, folder, stock.config.vision_config, class_token=True)
    about = (
        "A LLaVA in stock transformers format: CLIP's vision encoder, a projector, and a language model with its "
        "adapters merged. No code beyond transformers is needed."
    )
    tower = source.model.config.vision_config
    parts = part_rows(tower, source.manifest.language["source"], experts=False, trained="projector, adapters")
    exports.write_export_card(source, folder, about, STOCK_CODE, parts, [_NEUTRAL_NORM])


def stock_model(source: exports.ExportSource) -> LlavaForConditionalGeneration:
    """Put the checkpoint's parts into a stock LLaVA; no weight is copied."""
    model = source.model
    clip = model.tower.frozen.clip
    if clip is None:
        raise CheckpointError(f"{source.folder}: the tower's CLIP is not loaded; it cannot be exported without weights")
    text = type(model.config.text_config).from_dict(model.config.text_config.to_dict())
    config = LlavaConfig(
        vision_config=CLIPVisionConfig.from_dict(clip.config.to_dict()),
        text_config=text,
        image_token_index=model.config.image_token_id,
        projector_hidden_act=model.config.projector_hidden_act,
        multimodal_projector_bias=model.config.multimodal_projector_bias,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=model.config.vision_config.num_patches,
        tie_word_embeddings=bool(text.tie_word_embeddings),
        pad_token_id=source.processor.tokenizer.pad_token_id,
        conversation_template=source.manifest.template,
        image_aspect_ratio=source.manifest.image_aspect_ratio,
    )
    exports.without_paths(config)
    config.dtype = model.dtype
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(config)
    stock.model.vision_tower = _whole_clip(clip, config.vision_config)
    stock.model.multi_modal_projector = model.model.multi_modal_projector
    stock.model.language_model = model.model.language_model
    stock.lm_head = model.lm_head
    stock.generation_config = exports.generation_config(source)
    return stock.eval()


def _whole_clip(clip: CLIPVisionModel, config: CLIPVisionConfig) -> CLIPVisionModel:
    """Return the tower's CLIP with a final norm; modules are shared."""
    whole = copy.copy(clip)
    whole._modules = dict(clip._modules)
    whole.config = config
    width = config.hidden_size
    whole.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps).to(clip.device, clip.dtype)
    return whole


def _name_rope_as_before(file: Path) -> None:
    """Name rotary settings for transformers 4 too, which would use its defaults."""
    config = read_json_object(file)
    settings = dict(config["text_config"].get("rope_parameters") or {})
    if "rope_theta" not in settings:  # none, or one set per kind of layer, which transformers 4 names elsewhere
        return
    config["text_config"]["rope_theta"] = settings.pop("rope_theta")
    if settings.get("rope_type", "default") != "default":
        config["text_config"]["rope_scaling"] = settings
    write_json(file, config)


@torch.no_grad()
def check_tower(source: exports.ExportSource, stock: LlavaForConditionalGeneration) -> None:
    """Compare the tower's tokens with stock CLIP's on a random image."""
    tower, config = source.model.tower, source.model.config.vision_config
    size, clip_size = config.image_size, config.clip_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(tower.device, tower.dtype)
    own = tower(pixels).last_hidden_state
    if size != clip_size:
        pixels = nn.functional.interpolate(
            pixels.float(), (clip_size, clip_size), mode="bicubic", align_corners=False, antialias=True
        ).to(tower.dtype)
    seen = stock.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = seen[stock.config.vision_feature_layer][:, 1:]
    tolerance = 1e-5 if tower.dtype == torch.float32 else 2e-2
    if not torch.allclose(own, features, rtol=tolerance, atol=tolerance * float(own.abs().max())):
        raise CheckpointError(
            f"{source.folder}: the tower's tokens are not its CLIP's, so stock LLaVA cannot hold it (fusion "
            f"{config.fusion!r}). Merge it first (tove-llava merge), or export with --format remote-code"
        )


def _add_remarks(source: exports.ExportSource) -> None:
    vision = source.model.config.vision_config
    size, clip_size = vision.image_size, vision.clip_config.image_size
    if size != clip_size:
        source.remarks.append(
            f"The tower was trained on images of {size} pixels, which it reduced to CLIP's {clip_size}; here the "
            f"processor resizes to {clip_size} at once, so tokens differ slightly."
        )
    if source.manifest.template == "plain":
        source.remarks.append("Stage 1's template has no end token: cut answers at their first line break.")


def _public_name(name: str) -> str:
    """Add ``vision_model`` to a weight's name, as in older transformers."""
    return name.replace("model.vision_tower.", "model.vision_tower.vision_model.", 1)
