"""Count parameters and activations of a stage without loading weights."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from tove_llava.core.json_text import loads
from tove_llava.experts import build_expert
from tove_llava.llava.build import build_on_meta, language_config, torch_dtype, vision_config
from tove_llava.presets import LoraPreset, Preset, StagePreset, VisionPreset
from tove_llava.tower import ToveVisionConfig, ToveVisionModel, TowerFeatures
from tove_llava.train.recomputation import kept_products
from tove_llava.train.stages import ENCODER, LANGUAGE, LORA, Trainable, freeze


@dataclass(frozen=True)
class Shape:
    """Counts of a stage that :mod:`tove_llava.train.memory` needs: numbers, not bytes."""

    backbones: int  # parameters of CLIP and the experts
    registered: int  # parameters of language model, projector and tower, with those that the stage adds
    trained: int
    quantizable: int  # weights that the stage may quantise: the language model's linear layers
    layers: int
    hidden: int
    vocabulary: int
    image_tokens: int  # tokens of an image
    layer_kept: int  # per token, what a layer of the language model keeps for the backward pass
    layer_products: int  # per token, what selective checkpointing keeps of a layer, without its input
    fusion_kept: int  # per image, what the tower's fusion keeps
    encoder_kept: int  # per image, what a CLIP that trains keeps
    encoder_work: int  # per image, into and out of the largest layer of CLIP and the experts


def stage_shape(preset: Preset, stage_name: str) -> Shape:
    """Count a stage's parameters and activations.

    The model is built on the meta device with one and with two layers of the language model, and the stage's freezing
    policy is applied to it. Further layers count as the second.

    Raises:
        ConfigError: a setting of the preset is wrong.
        CheckpointError: a local source of an architecture is not there.
        ImportError: the stage needs peft, which is not installed.
    """
    stage = preset.stage(stage_name)
    vision = _vision_shape(json.dumps(asdict(preset.vision)))
    layers = language_config(preset.language).num_hidden_layers
    shallow, deeper = (_counts(preset, stage, vision, depth) for depth in (1, 2))
    registered, trained, quantizable = (
        one + (layers - 1) * (two - one) for one, two in zip(shallow.parameters, deeper.parameters, strict=True)
    )
    config, clip = deeper.model.config.get_text_config(), vision.config.clip_config
    encoder_kept = 16 * clip.hidden_size * vision.config.num_clip_layers * vision.config.num_patches
    return Shape(
        backbones=vision.backbones,
        registered=registered,
        trained=trained,
        quantizable=quantizable,
        layers=layers,
        hidden=config.hidden_size,
        vocabulary=deeper.model.lm_head.weight.shape[0],
        image_tokens=vision.config.num_image_tokens,
        layer_kept=_layer_kept(
            config,
            torch_dtype(preset.language.dtype),
            whole=LANGUAGE in deeper.parts,
            lora=stage.lora if LORA in deeper.parts else None,
        ),
        layer_products=kept_products(deeper.model.model.language_model.layers[0], config.hidden_size),
        fusion_kept=vision.fusion_kept,
        encoder_kept=encoder_kept if ENCODER in deeper.parts else 0,
        encoder_work=vision.encoder_work,
    )


@dataclass(frozen=True)
class _VisionShape:
    config: ToveVisionConfig
    backbones: int
    fusion_kept: int
    encoder_work: int


@lru_cache
def _vision_shape(preset: str) -> _VisionShape:
    """Count a ``VisionPreset``, given as JSON for the cache."""
    config = vision_config(VisionPreset(**loads(preset)), offline=True)
    backbones = [_empty_clip(config), *(build_expert(spec).meta_twin() for spec in config.expert_specs)]
    return _VisionShape(
        config=config,
        backbones=sum(p.numel() for module in backbones for p in module.parameters()),
        fusion_kept=_fusion_kept(config),
        encoder_work=max(_largest_layer(module) for module in backbones),
    )


@dataclass(frozen=True)
class _Counts:
    model: Any
    parts: frozenset[str]
    parameters: tuple[int, int, int]  # registered, trained, quantizable


def _counts(preset: Preset, stage: StagePreset, vision: _VisionShape, layers: int) -> _Counts:
    model = build_on_meta(preset, layers=layers, vision=copy.deepcopy(vision.config))
    linear = (m for m in model.model.language_model.modules() if isinstance(m, nn.Linear))
    quantizable = sum(m.weight.numel() for m in linear)
    model.tower.frozen.clip = _empty_clip(vision.config)  # the stage that merges trains a copy of it
    trainable = freeze(model, stage)
    registered = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in trainable.parameters())
    return _Counts(model, frozenset(trainable.parts), (registered, trained, quantizable))


def _empty_clip(vision: ToveVisionConfig) -> CLIPVisionModel:
    """Build CLIP up to the layer in use, on the meta device."""
    config = CLIPVisionConfig(**{**vision.clip_config.to_dict(), "num_hidden_layers": vision.num_clip_layers})
    with torch.device("meta"):
        return CLIPVisionModel(config).eval()


def kept_by_layer(language: Any, trainable: Trainable, lora: LoraPreset | None) -> int:
    """Count what a layer keeps per token without recomputation."""
    parts = trainable.parts
    return _layer_kept(language.config, language.dtype, whole=LANGUAGE in parts, lora=lora if LORA in parts else None)


def _layer_kept(config: Any, dtype: torch.dtype, *, whole: bool, lora: LoraPreset | None) -> int:
    """Count what a LLaMA layer with fused attention keeps per token.

    Measured with torch's record of allocations. Norms, queries, keys, values, attention and residuals keep 6 times the
    width, the gated MLP 3 times its own. Norms compute in float32: in 16 bits that adds 2 widths. A weight that trains
    keeps its input too. An adapter keeps its input, its rank, and with dropout the dropped-out input.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    norms = 0 if dtype == torch.float32 else 2
    if whole:
        return (10 + norms) * hidden + 4 * intermediate
    kept = (6 + norms) * hidden + 3 * intermediate
    if lora is not None:
        kept += 2 * hidden + intermediate + 7 * lora.r
        kept += (10 * hidden + intermediate) if lora.dropout else 0
    return kept


def _fusion_kept(vision: ToveVisionConfig) -> int:
    """Run the fusion on the CPU and count what it keeps."""
    tower = ToveVisionModel(vision).train()
    features = TowerFeatures(
        base=torch.zeros(1, vision.num_patches, vision.clip_width),
        experts={s.name: torch.zeros(1, s.width, *s.grid) for s in vision.expert_specs},
    )
    parameters = {p.untyped_storage().data_ptr() for p in tower.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = tower.fuse(features)
    del output
    return sum(kept.values())


def _largest_layer(module: Any) -> int:
    """Count the inputs and outputs of a module's largest layer, per image."""
    size = getattr(module, "image_size", None) or module.config.image_size
    sizes = [0]

    def record(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in (*inputs, output) if isinstance(x, torch.Tensor)]
        sizes.append(sum(x.numel() for x in tensors))

    handles = [m.register_forward_hook(record) for m in module.modules() if not list(m.children())]
    run: Callable[..., Any] = getattr(module, "features", module)
    with torch.no_grad():
        run(torch.empty(1, 3, size, size, device="meta"))
    for handle in handles:
        handle.remove()
    return max(sizes)
