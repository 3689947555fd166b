"""Token encoders from timm: one base for every model with ``forward_intermediates``."""

import json
from pathlib import Path
from typing import Any, ClassVar

import timm
from torch import Tensor, nn

from tove_llava.errors import ConfigError
from tove_llava.experts.base import Expert
from tove_llava.sources import Source, TimmSource

_INTERPOLATIONS = {"bicubic": "bicubic", "bilinear": "bilinear"}
_SPDX = {"mit": "MIT", "apache-2.0": "Apache-2.0"}


class TimmExpert(Expert):
    """Patch tokens of one block of a timm model.

    Options:
        layer: the block whose tokens are returned, counted as in a list (-1 is the last); later blocks are not run.
        norm: apply the model's final norm to them (default: only after the last block).
    """

    option_names = ("layer", "norm")
    build_at_image_size: ClassVar[bool] = True  # False for models that take other sizes than they were built for

    @property
    def _model_name(self) -> str:
        path = self.source.path
        return f"local-dir:{path}" if path is not None else self.source.target

    def configure(self) -> int:
        config, args = _read_config(self.source)
        self._pretrained_cfg = config
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.interpolation = _INTERPOLATIONS.get(config.get("interpolation", "bicubic"), "bicubic")
        size = args.get("img_size") or config["input_size"][-1]
        return size[0] if isinstance(size, (list, tuple)) else size

    def build(self, pretrained: bool) -> nn.Module:
        size = {"img_size": self.image_size} if self.build_at_image_size else {}
        overlay = None
        if self.spec.revision:
            if self.source.path is not None:
                raise ConfigError(f"expert {self.name!r}: a local folder has no revision {self.spec.revision!r}")
            overlay = {"hf_hub_id": f"{self._pretrained_cfg['hf_hub_id']}@{self.spec.revision}"}
        # With the head it was saved with, timm loads strictly; only then is the head taken off.
        model = timm.create_model(self._model_name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **size)
        model.reset_classifier(0)
        return model

    def features(self, pixels: Tensor) -> Tensor:
        layer, depth = self.option("layer", -1), len(self.network.feature_info)
        is_last = layer in (-1, depth - 1)
        [tokens] = self.network.forward_intermediates(
            pixels,
            indices=[_block(layer, depth, self.name)],
            norm=self.option("norm", is_last),
            output_fmt="NCHW",
            intermediates_only=True,
            stop_early=True,
        )
        return tokens

    def hub_file(self) -> tuple[str, str] | None:
        repository = self._pretrained_cfg.get("hf_hub_id")
        return (repository, "model.safetensors") if self.source.path is None and repository else None

    def licence(self) -> str:
        licence = self._pretrained_cfg.get("license") or super().licence()
        return _SPDX.get(licence, licence)

    def save_backbone(self, folder: Path) -> Source:
        data = {"mean": self.mean, "std": self.std, "interpolation": self.interpolation}
        timm.models.save_for_hf(self.network, str(folder), safe_serialization=True, data_config=data)
        return TimmSource("").at(folder)


def _block(layer: int, depth: int, name: str) -> int:
    if not isinstance(layer, int) or not -depth <= layer < depth:
        raise ConfigError(f"expert {name!r}: option layer={layer!r} must be from {-depth} to {depth - 1}")
    return layer % depth


def _read_config(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's preprocessing configuration and model arguments of a source."""
    if source.path is not None:
        file = source.require() / "config.json"
        try:
            content = json.loads(file.read_text())
            return content["pretrained_cfg"], content.get("model_args") or {}
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"source {source}: {file} is not what timm's save_for_hf writes ({error!r})") from error
    try:
        config = timm.models.get_pretrained_cfg(source.target)
    except RuntimeError as error:
        raise ConfigError(f"source {source}: {error}") from error
    if config is None or not timm.is_model(source.target):
        raise ConfigError(
            f"source {source}: timm {timm.__version__} has no such model or tag; see timm.list_pretrained()"
        )
    return config.to_dict(), {}
