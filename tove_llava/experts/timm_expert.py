"""Token encoders from timm: one base for every model with ``forward_intermediates``."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.paths import check_folder, refuse_pickles
from tove_llava.core.registry import closest
from tove_llava.core.safe_loading import summary
from tove_llava.core.sources import Source, TimmSource
from tove_llava.experts.base import Expert, choose, library

# Keys of a folder's configuration with which timm would read weights from elsewhere, and arguments of create_model.
_ELSEWHERE = ("url", "file", "state_dict", "source", "hf_hub_id", "hf_hub_filename", "custom_load")
_CREATE = {"model_name", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit"}
_SPDX = {"mit": "MIT", "apache-2.0": "Apache-2.0"}


class TimmExpert(Expert):
    """Patch tokens of one block of a timm model.

    Options:
        layer: index of the block whose tokens are returned (-1 is the last); later blocks do not run.
        norm: apply the model's final norm to them (default: only after the last block).
    """

    option_names = ("layer", "norm")
    build_at_image_size: ClassVar[bool] = True  # False for models that accept other sizes
    _built_at_size = False

    def configure(self) -> int:
        self._architecture, self._pretrained_cfg, self._model_args = _read_config(self.source)
        if self.source.path is None and self.source.target != self._architecture:  # the default tag may change
            self.spec = self.spec.replace(source=self.spec.source.removesuffix(self.source.target) + self._architecture)
            self.source = TimmSource(self._architecture)
        self.configuration = repr((self._architecture, self._model_args))
        config = self._pretrained_cfg
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.interpolation = config.get("interpolation", "bicubic")
        size = self._model_args.get("img_size") or config["input_size"][-1]
        return size[0] if isinstance(size, (list, tuple)) else size

    def build(self, pretrained: bool) -> nn.Module:
        args, config = dict(self._model_args), dict(self._pretrained_cfg)
        if self.spec.revision:
            if self.source.path is not None:
                raise ConfigError(f"expert {self.name!r}: a local folder has no revision {self.spec.revision!r}")
            config["hf_hub_id"] = f"{config['hf_hub_id']}@{self.spec.revision}"
        if pretrained and self.source.path is not None:
            config["file"] = str(_weights(self.source))
        create = partial(_timm(self.source).create_model, pretrained=pretrained, pretrained_cfg=config, **args)
        model = self._at_size(create) if self.build_at_image_size else create(self._architecture)
        if not hasattr(model, "forward_intermediates"):
            raise ConfigError(
                f"expert {self.name!r}: timm's {self._architecture} has no forward_intermediates, which gives an "
                "expert's tokens; choose another model, or write an expert of your own (docs/guides/extend.md)"
            )
        model.reset_classifier(0)  # only now: timm loads strictly, with the saved head
        return model

    def _at_size(self, create: Callable[..., nn.Module]) -> nn.Module:
        """Build for ``image_size``, if the architecture depends on it."""
        try:
            model = create(self._architecture, img_size=self.image_size)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return create(self._architecture)
        self._built_at_size = True  # the saved positions are interpolated to this size
        return model

    def output_shape(self) -> tuple[int, int, int]:
        try:
            return super().output_shape()
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            own = self._pretrained_cfg["input_size"][-1]
            raise ConfigError(
                f"expert {self.name!r}: timm's {self._architecture} gives no tokens at {self.image_size} pixels "
                f"({summary(error)}). Its own size is {own} (image_size: {own}); a norm that it lacks is left out by "
                "options: {norm: false}"
            ) from error

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
        if self.source.path is not None:
            return None
        repository = _read_config(self.source)[1].get("hf_hub_id")  # asked before the configuration is read
        return (repository, "model.safetensors") if repository else None

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
        if self._built_at_size:
            args["img_size"] = self.image_size
        _timm(self.source).models.save_for_hf(self.network, str(folder), model_args=args, safe_serialization=True)
        return TimmSource("").at(folder)


def _timm(source: Source) -> Any:
    with library(source, "timm"):
        import timm
    return timm


def _weights(source: Source) -> Path:
    """Return the folder's safetensors file; older timm would prefer a pickle."""
    refuse_pickles(source.require())
    file = source.require() / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"source {source}: no model.safetensors in the folder")
    return file


def _read_config(source: Source) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read timm's architecture, preprocessing configuration and model arguments of a source."""
    if source.path is None:
        return _named_config(source)
    check_folder(source.require())
    file = source.require() / "config.json"
    content = read_json_object(file, ConfigError)
    try:
        config = {key: value for key, value in content["pretrained_cfg"].items() if key not in _ELSEWHERE}
        name, args = content["architecture"], dict(content.get("model_args") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"source {source}: {file} is not what timm's save_for_hf writes ({error!r})") from error
    check_timm_name(name, source)
    odd = sorted(args.keys() & _CREATE | {key for key in args if key.startswith("pretrained")})
    if odd:
        raise ConfigError(f"source {source}: {file}: model_args name {odd[0]!r}, which is no part of an architecture")
    return name, {**config, "num_classes": content.get("num_classes", 0)}, args


def check_timm_name(name: Any, source: Source) -> None:
    """Raise ConfigError unless a folder's architecture is timm's own: timm also takes paths and repositories here."""
    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.[\w-]+)?", name, re.ASCII):
        raise ConfigError(f"source {source}: its configuration names {name!r}, which is no model of timm")


def _named_config(source: Source) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Look up a model's name, without a tag the default one's; ConfigError names near matches."""
    timm = _timm(source)
    model, _, tag = source.target.partition(".")
    if not timm.is_model(model):
        raise ConfigError(
            f"source {source}: timm {timm.__version__} has no such model {model!r}."
            f"{closest(model, timm.list_models())} A folder is written timm:./folder"
        )
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{model}.*")]
    if tag and tag not in tags:
        raise ConfigError(
            f"source {source}: timm {timm.__version__} has no weights {tag!r} of {model}.{closest(tag, tags)} It has: "
            f"{', '.join(tags) or 'none'}"
        )
    config = timm.models.get_pretrained_cfg(source.target)
    return f"{model}.{config.tag}" if config.tag in tags else model, config.to_dict(), {}
