"""Token encoders from timm: one base for every model with ``forward_intermediates``."""

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.sources import Source, TimmSource
from tove_llava.experts.base import Expert, choose, library

_SPDX = {"mit": "MIT", "apache-2.0": "Apache-2.0"}


class TimmExpert(Expert):
    """Patch tokens of one block of a timm model.

    Options:
        layer: index of the block whose tokens are returned (-1 is the last); later blocks do not run.
        norm: apply the model's final norm to them (default: only after the last block).
    """

    option_names = ("layer", "norm")
    build_at_image_size: ClassVar[bool] = True  # False for models that accept other sizes

    def configure(self) -> int:
        self._architecture, self._pretrained_cfg, self._model_args = _read_config(self.source)
        self.configuration = repr((self._architecture, self._model_args))
        config = self._pretrained_cfg
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.interpolation = config.get("interpolation", "bicubic")
        size = self._model_args.get("img_size") or config["input_size"][-1]
        return size[0] if isinstance(size, (list, tuple)) else size

    def build(self, pretrained: bool) -> nn.Module:
        args, config = dict(self._model_args), dict(self._pretrained_cfg)
        if self.build_at_image_size:
            args["img_size"] = self.image_size
        if self.spec.revision:
            if self.source.path is not None:
                raise ConfigError(f"expert {self.name!r}: a local folder has no revision {self.spec.revision!r}")
            config["hf_hub_id"] = f"{config['hf_hub_id']}@{self.spec.revision}"
        if pretrained and self.source.path is not None:
            config["file"] = str(_weights(self.source))
        # timm loads strictly with the saved head; only then is the head removed.
        timm = _timm(self.source)
        model = timm.create_model(self._architecture, pretrained=pretrained, pretrained_cfg=config, **args)
        model.reset_classifier(0)
        return model

    def features(self, pixels: Tensor) -> Tensor:
        layer, depth = self.option("layer", -1), len(self.network.feature_info)
        is_last = layer in (-1, depth - 1)
        [tokens] = self.network.forward_intermediates(
            pixels,
            indices=[choose(layer, depth, f"expert {self.name!r}: option layer")],
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

    def set_attention(self, implementation: str) -> None:
        for module in self.network.modules():
            if hasattr(module, "fused_attn"):  # timm's name for torch's scaled_dot_product_attention
                module.fused_attn = implementation != "eager"

    def save_backbone(self, folder: Path) -> Source:
        read = {"mean": self.mean, "std": self.std, "interpolation": self.interpolation}
        self.network.pretrained_cfg = {**self.network.pretrained_cfg, **read, "num_classes": 0}
        args = {**self._model_args, "num_classes": 0}
        if self.build_at_image_size:
            args["img_size"] = self.image_size  # the saved positions are interpolated to this size
        _timm(self.source).models.save_for_hf(self.network, str(folder), model_args=args, safe_serialization=True)
        return TimmSource("").at(folder)


def _timm(source: Source) -> Any:
    with library(source, "timm"):
        import timm
    return timm


def _weights(source: Source) -> Path:
    """Return the folder's safetensors file; older timm would prefer a pickle."""
    file = source.require() / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(
            f"source {source}: no model.safetensors in the folder. A pickle (.bin, .pth) is not opened: it could "
            "run code. Convert them to safetensors: timm's save_for_hf(..., safe_serialization=True)"
        )
    return file


def _read_config(source: Source) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read timm's architecture, preprocessing configuration and model arguments of a source."""
    if source.path is None:
        timm = _timm(source)
        try:
            config = timm.models.get_pretrained_cfg(source.target)
        except RuntimeError as error:
            raise ConfigError(f"source {source}: {error}") from error
        if config is None or not timm.is_model(source.target):
            raise ConfigError(
                f"source {source}: timm {timm.__version__} has no such model or tag; see timm.list_pretrained()"
            )
        return source.target, config.to_dict(), {}
    file = source.require() / "config.json"
    content = read_json_object(file, ConfigError)
    try:
        config = {**content["pretrained_cfg"], "num_classes": content.get("num_classes", 0)}
        return content["architecture"], config, content.get("model_args") or {}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"source {source}: {file} is not what timm's save_for_hf writes ({error!r})") from error
