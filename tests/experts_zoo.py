"""Small random models of each library's real architecture, in published formats.

Libraries that a GPU image may lack are imported where they are used: its tests import this file.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as tf
from safetensors.torch import save_file


@dataclass(frozen=True)
class Case:
    """A model to read, ``make(folder) -> source``, and its expert's expected results."""

    expert: str
    make: Callable[[Path], str]
    width: int
    grid: tuple[int, int]
    image_size: int | None = None
    mode: str = "features"
    options: dict[str, Any] = field(default_factory=dict)

    def spec(self, folder: Path, name: str = "x") -> dict[str, Any]:
        saved, source = save_once(self.make)
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        entry = {"name": name, "expert": self.expert, "source": source.replace(str(saved), str(folder))}
        return entry | {"mode": self.mode, "image_size": self.image_size, "options": self.options}


@cache
def save_once(make: Callable[[Path], str]) -> tuple[Path, str]:
    """The folder of a model, made once a process, and its source."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    torch.manual_seed(0)
    return folder, make(folder)


def timm_folder(architecture: str, **kwargs: Any) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        model = timm.create_model(architecture, **kwargs)
        timm.models.save_for_hf(model, str(folder), model_args=kwargs, safe_serialization=True)
        return f"timm:local-dir:{folder}"

    return make


def open_clip_folder(folder: Path) -> str:
    import open_clip

    timm_keys = {"model_name": "eva02_tiny_patch14_224", "model_pretrained": False, "pool": "token", "proj": None}
    vision = {"image_size": 56, **{f"timm_{key}": value for key, value in timm_keys.items()}}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic"}
    config = {"model_cfg": model | {"custom_text": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.CustomTextCLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    return f"open_clip:local-dir:{folder}"


def transformers_folder(cls: type, config: Any, size: int) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        cls(config).save_pretrained(folder)
        statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
        processor = {**statistics, "resample": 2, "size": {"height": size, "width": size}}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return f"hf:{folder}"

    return make


def segformer(labels: int) -> Callable[[Path], str]:
    sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16}
    return transformers_folder(tf.SegformerForSemanticSegmentation, tf.SegformerConfig(**sizes, num_labels=labels), 96)


def depth_anything(size: int, width: int, stages: tuple[int, ...], **keys: Any) -> Callable[[Path], str]:
    """A Depth-Anything with as many DINOv2 layers as its last stage."""
    backbone = tf.Dinov2Config(
        hidden_size=width,
        num_hidden_layers=stages[-1],
        image_size=size,
        out_features=[f"stage{stage}" for stage in stages],
        reshape_hidden_states=False,
        **keys.pop("backbone"),
    )
    return transformers_folder(
        tf.DepthAnythingForDepthEstimation, tf.DepthAnythingConfig(backbone_config=backbone, **keys), size
    )


def save_large_experts(folder: Path) -> list[dict[str, Any]]:
    """The large preset's experts at their real widths.

    Those that have 24 layers get two.
    """
    from kornia.models.dexined import DexiNed

    sizes = {"neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64}
    backbone = {"num_attention_heads": 6, "patch_size": 14, "apply_layernorm": True}
    makers = {
        "eva": timm_folder("eva02_large_patch14_clip_336", depth=2),
        "dinov2": timm_folder("vit_large_patch14_dinov2", depth=2),
        "depth": depth_anything(518, 384, (3, 6, 9, 12), backbone=backbone, **sizes),
    }
    entries = []
    for name, make in makers.items():
        (folder / name).mkdir()
        entries.append({"name": name, "source": make(folder / name), "image_size": 336})
    save_file(DexiNed(pretrained=False).state_dict(), folder / "dexined.safetensors")
    source = f"kornia:{folder / 'dexined.safetensors'}"
    return [*entries, {"name": "edge", "source": source, "mode": "map", "image_size": 336}]


_SMALL = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
_DPT = {
    **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, **_SMALL},
    **{"image_size": 64, "patch_size": 16, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False},
}
dpt_depth = transformers_folder(tf.DPTForDepthEstimation, tf.DPTConfig(**_DPT), 64)
dpt_normal = transformers_folder(tf.DPTForSemanticSegmentation, tf.DPTConfig(**_DPT, num_labels=3), 64)
_ANYTHING = {**_SMALL, "reassemble_hidden_size": 32, "head_hidden_size": 8}
depth_anything_small = depth_anything(70, 32, (1, 2, 3, 4), backbone={"num_attention_heads": 4}, **_ANYTHING)
_SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
_WIDTHS = ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")
_MASK2FORMER = {**dict.fromkeys(_WIDTHS, 32), "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
mask2former = transformers_folder(
    tf.Mask2FormerForUniversalSegmentation,
    tf.Mask2FormerConfig(
        backbone_config=tf.SwinConfig(**_SWIN, out_features=[f"stage{stage}" for stage in (1, 2, 3, 4)]),
        **_MASK2FORMER,
        num_queries=5,
        num_labels=7,
    ),
    64,
)

_VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}
eva = timm_folder("eva02_tiny_patch14_224", img_size=56, depth=3)
sam = timm_folder("samvit_base_patch16", img_size=128, global_attn_indexes=(2,), **_VIT)
CASES = {
    "eva-timm": Case("eva", eva, 192, (4, 4)),
    "eva-timm-resized": Case("eva", eva, 192, (6, 6), 84),
    "eva-open_clip": Case("eva", open_clip_folder, 192, (4, 4)),
    "eva-open_clip-resized": Case("eva", open_clip_folder, 192, (6, 6), 84),
    "dinov2": Case("dinov2", timm_folder("vit_small_patch14_dinov2", img_size=70, **_VIT), 32, (4, 4), 56),
    "dinov2-registers": Case("dinov2", timm_folder("vit_small_patch14_reg4_dinov2", img_size=56, **_VIT), 32, (4, 4)),
    "dinov3": Case("dinov3", timm_folder("vit_small_patch16_dinov3", img_size=64, **_VIT), 32, (4, 4)),
    "siglip2": Case("siglip2", timm_folder("vit_base_patch16_siglip_224", img_size=64, **_VIT), 32, (4, 4)),
    "timm-conv": Case("timm", timm_folder("convnext_atto"), 320, (2, 2), 64),
    "timm-vit": Case("timm", timm_folder("vit_tiny_patch16_224", img_size=64, depth=2), 192, (3, 3), 48),
    "sam": Case("sam", sam, 256, (4, 4), 64),
    "sam-block": Case("sam", sam, 32, (8, 8), options={"norm": False}),
    "depth-dpt": Case("depth", dpt_depth, 32, (4, 4)),
    "depth-dpt-map": Case("depth", dpt_depth, 1, (64, 64), mode="map"),
    "depth-anything": Case("depth", depth_anything_small, 32, (5, 5)),
    "depth-anything-map": Case("depth", depth_anything_small, 1, (70, 70), mode="map"),
    "depth-segformer": Case("depth", segformer(1), 32, (3, 3)),
    "depth-segformer-map": Case("depth", segformer(1), 1, (24, 24), mode="map"),
    "normal-dpt": Case("normal", dpt_normal, 32, (4, 4)),
    "normal-dpt-map": Case("normal", dpt_normal, 3, (64, 64), mode="map"),
    "normal-segformer-map": Case("normal", segformer(3), 3, (24, 24), mode="map"),
    "segmentation-segformer": Case("segmentation", segformer(6), 24, (6, 6), options={"stage": 2}),
    "segmentation-segformer-map": Case("segmentation", segformer(6), 6, (24, 24), mode="map"),
    "segmentation-mask2former": Case("segmentation", mask2former, 64, (2, 2)),
    "segmentation-mask2former-map": Case("segmentation", mask2former, 7, (16, 16), mode="map"),
    "edge-segformer": Case("edge", segformer(1), 32, (2, 2), 64),
    "edge-segformer-map": Case("edge", segformer(1), 1, (12, 12), mode="map", options={"map_size": 12}),
}
