"""Size up a preset's model and an image's cost, without any weight."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from tove_llava.core.text import aligned
from tove_llava.experts import build_expert
from tove_llava.experts.cost import expert_cost
from tove_llava.llava.build import build_on_meta
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration
from tove_llava.presets import Preset, load_preset
from tove_llava.tower import ToveVisionModel, TowerFeatures

TEXT_TOKENS = 64  # of prompt and answer, in addition to an image's


@dataclass(frozen=True)
class Size:
    """One part's parameters, and its GFLOPs per image (two per multiply-add)."""

    part: str
    parameters: int
    gflops: float


def preset_sizes(preset: str | Preset) -> list[Size]:
    """Size up the parts of a preset's model, in the image's order.

    The language model is counted with one image and :data:`TEXT_TOKENS` tokens of text.
    """
    preset = load_preset(preset) if isinstance(preset, str) else preset
    model = build_on_meta(preset)
    vision = model.config.vision_config
    sizes = [_clip(vision)]
    for spec in vision.expert_specs:
        cost = expert_cost(build_expert(spec))
        sizes.append(Size(f"expert {spec.name}", cost.parameters, cost.flops / 1e9))
    features = TowerFeatures(
        base=torch.zeros(1, vision.num_patches, vision.clip_width),
        experts={s.name: torch.zeros(1, s.width, *s.grid) for s in vision.expert_specs},
    )
    tower = ToveVisionModel(vision).eval()  # small enough to run; the gate's autocast does not know the meta device
    sizes.append(Size("tower: gate and projections", _count(tower), _gflops(lambda: tower.fuse(features))))
    projector = model.model.multi_modal_projector
    tokens = features.base.to("meta", next(projector.parameters()).dtype)
    sizes.append(Size("projector", _count(projector), _gflops(lambda: projector(tokens))))
    sizes.append(_language(model, vision.num_image_tokens + TEXT_TOKENS))
    return sizes


def format_sizes(sizes: list[Size]) -> str:
    """Format the sizes and their sum as a table."""
    total = Size("all", sum(s.parameters for s in sizes), sum(s.gflops for s in sizes))
    rows = [[size.part, f"{size.parameters:,}", f"{size.gflops:,.1f}"] for size in (*sizes, total)]
    note = f"GFLOP: forward pass, two per multiply-add; language model over one image and {TEXT_TOKENS} text tokens"
    return f"{aligned([['part', 'parameters', 'GFLOP/image'], *rows])}\n{note}"


def _clip(vision: Any) -> Size:
    config = CLIPVisionConfig(**{**vision.clip_config.to_dict(), "num_hidden_layers": vision.num_clip_layers})
    with torch.device("meta"):
        clip = CLIPVisionModel(config).eval()
        pixels = torch.zeros(1, 3, config.image_size, config.image_size)
    return Size("CLIP", _count(clip), _gflops(lambda: clip(pixels)))


def _language(model: ToveLlavaForConditionalGeneration, tokens: int) -> Size:
    language, head = model.model.language_model.eval(), model.lm_head
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # A finished mask, because transformers would make one from values, which the meta device lacks.
    mask = torch.zeros(1, 1, tokens, tokens, dtype=head.weight.dtype, device="meta")
    parts = nn.ModuleList([language, head])
    return Size(
        "language model",
        _count(parts),
        _gflops(lambda: head(language(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)),
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _gflops(run: Callable[[], Any]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9
