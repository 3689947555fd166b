"""Needed FLOPs of a training step, also for models too large.

The convention is that of train_step.py.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from measuring import count_flops
from step_parts import TrainingStep, make_batch

from tove_llava.llava.build import build_on_meta, language_config, vision_config
from tove_llava.llava.loss import supervised_loss
from tove_llava.llava.sizes import preset_sizes
from tove_llava.presets import Preset, StagePreset
from tove_llava.tower import ToveVisionModel, TowerFeatures
from tove_llava.train.stages import TOWER, freeze

SHORT, LONG, FEW, MANY = 32, 96, 8, 24  # tokens of text, and supervised ones, of the records that are counted


@dataclass(frozen=True)
class RecordFlops:
    """A record's FLOPs: fixed, by length, by square, and by supervision."""

    fixed: float
    linear: float
    square: float
    supervised: float

    def __call__(self, length: int, supervised: int) -> float:
        return self.fixed + self.linear * length + self.square * length**2 + self.supervised * supervised


def record_flops(step: TrainingStep) -> dict[bool, RecordFlops]:
    """Count FLOPs of records with one image (True) and without.

    A layer's products grow with the length, attention with its square and the head with the supervised positions; so
    four counts determine all lengths. Text without an image needs no gradient below its lowest trained weights.
    """
    model = step.model
    picture = model.config.vision_config.num_image_tokens
    found = {}
    for with_picture in (True, False):
        start = picture if with_picture else 0

        def cost(text: int, supervised: int, with_picture: bool = with_picture) -> int:
            return _count(step, text, supervised, with_picture)

        per_supervised = (cost(SHORT, MANY) - cost(SHORT, FEW)) / (MANY - FEW)
        lengths = [start + text for text in (SHORT, (SHORT + LONG) // 2, LONG)]
        costs = [cost(length - start, FEW) - FEW * per_supervised for length in lengths]
        square, linear, fixed = _parabola(lengths, costs)
        found[with_picture] = RecordFlops(fixed, linear, square, per_supervised)
    return found


def _count(step: TrainingStep, text: int, supervised: int, with_picture: bool) -> int:
    batch = make_batch(step.model, 1, text, step.dtype, 0, supervised=supervised)
    if not with_picture:
        del batch["pixel_values"]
        kept = batch["input_ids"][0] != step.model.config.image_token_index
        batch["supervised"] = batch["supervised"] - int((~kept).sum())
        batch |= {key: batch[key][:, kept] for key in ("input_ids", "attention_mask", "labels")}
    return sum(step.needed_flops(batch).values())


def _parabola(x: list[int], y: list[float]) -> tuple[float, float, float]:
    """Return ``a, b, c`` of the parabola through three points."""
    first, second = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    a = (second - first) / (x[2] - x[0])
    b = first - a * (x[0] + x[1])
    return a, b, y[0] - a * x[0] ** 2 - b * x[0]


def without_experts(preset: Preset) -> Preset:
    """Return the same preset with plain CLIP."""
    data = json.loads(json.dumps(asdict(preset)))
    vision = type(preset.vision)(**{**data["vision"], "experts": [], "fusion": "none"})
    return type(preset)(**{**vars(preset), "vision": vision})


def step_flops_on_meta(preset: Preset, stage_name: str, text_tokens: int, supervised: int) -> float:
    """Count a step's FLOPs on a record with an image, from shapes.

    Only the small fusion runs. The language model is counted with one and with two layers; further ones are alike.
    """
    stage = preset.stage(stage_name)
    encoders = 1e9 * sum(_encoder_gflops(preset.name)[name] for name in ["CLIP", *_experts(preset)])
    config = vision_config(preset.vision, offline=True)
    one, two = (_language_flops(preset, stage, text_tokens, supervised, layers) for layers in (1, 2))
    layers = language_config(preset.language).num_hidden_layers
    return encoders + _fusion_flops(config) + one + (layers - 1) * (two - one)


@lru_cache
def _encoder_gflops(preset: str) -> dict[str, float]:
    """List the GFLOPs of an image by part."""
    return {size.part: size.gflops for size in preset_sizes(preset)}


def _experts(preset: Preset) -> list[str]:
    return [f"expert {entry['name']}" for entry in preset.vision.experts]


def _fusion_flops(config: Any) -> int:
    tower = ToveVisionModel(config).train()
    features = TowerFeatures(
        base=torch.zeros(1, config.num_patches, config.clip_width),
        experts={s.name: torch.zeros(1, s.width, *s.grid) for s in config.expert_specs},
    )
    if not list(tower.parameters()):
        return 0
    return count_flops(lambda: tower.fuse(features).last_hidden_state.sum().backward())


def _language_flops(preset: Preset, stage: StagePreset, text: int, supervised: int, layers: int) -> int:
    """Count forward and backward of projector, language model and head."""
    model = build_on_meta(preset, layers=layers).train()
    trainable = freeze(model, stage)
    model.to("meta")
    vision, dtype = model.config.vision_config, model.dtype
    tokens = torch.zeros(1, vision.num_image_tokens, vision.hidden_size, dtype=dtype, device="meta")
    tokens.requires_grad_(TOWER in trainable.parts)
    words = torch.zeros(1, text, model.config.text_config.hidden_size, dtype=dtype, device="meta")
    length = vision.num_image_tokens + text
    labels = torch.zeros(1, length, dtype=torch.long, device="meta")
    positions = torch.zeros(supervised, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, length, length, dtype=dtype, device="meta")  # as in tove_llava.llava.sizes

    def run() -> None:
        inputs = torch.cat([model.model.multi_modal_projector(tokens), words], dim=1)
        states = model.model.language_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
        supervised_loss(states.last_hidden_state, labels, positions, model.lm_head).backward()

    return count_flops(run)
