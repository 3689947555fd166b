"""EVA-02 through open_clip, a second source of the same expert."""

from typing import Any

from torch import nn

from tove_llava.core.errors import ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.paths import check_folder, refuse_pickles
from tove_llava.core.sources import OpenClipSource, Source
from tove_llava.experts.base import Expert, library, register_expert
from tove_llava.experts.timm_expert import TimmExpert, check_timm_name


@register_expert("eva", "open_clip")
class EvaOpenClip(TimmExpert):
    """An open_clip model's vision tower, which is a timm trunk for EVA-02.

    Saved by value it becomes a ``timm:local-dir:`` folder, which the timm class of the same expert reads.
    """

    default_source = "open_clip:EVA02-L-14-336/merged2b_s6b_b61k"
    default_image_size = 336

    def configure(self) -> int:
        self._vision, preprocess = _read_config(self.source)
        pool = self._vision.get("timm_pool")  # the norm is before or after the pooling accordingly
        self._model_args: dict[str, Any] = {"global_pool": pool} if pool else {}
        if self.spec.revision:
            raise ConfigError(f"expert {self.name!r}: open_clip sources take no revision; the tag says which weights")
        self.configuration = repr((self._vision, self._model_args))
        self.mean, self.std = tuple(preprocess["mean"]), tuple(preprocess["std"])
        self.interpolation = preprocess.get("interpolation", "bicubic")
        return self._vision["image_size"]

    source: OpenClipSource  # type: ignore[assignment]

    def build(self, pretrained: bool) -> nn.Module:
        if pretrained:
            model, tag = self.source.model_and_tag
            clip = _open_clip(self.source).create_model(
                model, pretrained=tag, require_pretrained=True, pretrained_text=False, force_image_size=self.image_size
            )
            trunk = clip.visual.trunk
        else:
            with library(self.source, "timm"):
                import timm
            trunk = timm.create_model(self._vision["timm_model_name"], img_size=self.image_size, **self._model_args)
        trunk.reset_classifier(0)
        return trunk

    def hub_file(self) -> tuple[str, str] | None:
        if self.source.path is not None:
            return None
        repository = _read_config(self.source)[1].get("hf_hub", "").strip("/")
        return (repository, "open_clip_model.safetensors") if repository else None

    def licence(self) -> str:
        return "MIT" if self.source.path is None else Expert.licence(self)  # the licence of EVA-CLIP's weights


def _open_clip(source: Source) -> Any:
    with library(source, "open_clip_torch"):
        import open_clip
    return open_clip


def _read_config(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read open_clip's vision configuration and preprocessing of a source."""
    assert isinstance(source, OpenClipSource)
    name, tag = source.model_and_tag
    if tag is None:
        check_folder(source.require())
        refuse_pickles(source.require())
        file = source.require() / "open_clip_config.json"
        content = read_json_object(file, ConfigError)
        try:
            model, preprocess = content["model_cfg"], content["preprocess_cfg"]
            other = [key for key in model["text_cfg"] if key.startswith("hf_model")]
            name = model["vision_cfg"].get("timm_model_name", "none")
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"source {source}: {file} lacks a readable model_cfg and preprocess_cfg") from error
        check_timm_name(name, source)
        if other:
            raise ConfigError(f"source {source}: {file} names a text encoder elsewhere ({other[0]}); save it by value")
    else:
        open_clip = _open_clip(source)
        model, preprocess = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
        if not model or not preprocess:
            raise ConfigError(f"source {source}: open_clip has no such model and tag; see open_clip.list_pretrained()")
    if "timm_model_name" not in model["vision_cfg"]:
        raise ConfigError(f"source {source}: its vision tower is not a timm model (EVA-02 models are)")
    return model["vision_cfg"], preprocess
