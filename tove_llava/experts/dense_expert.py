"""The base of dense-prediction experts: depth, normals, edges and segmentation."""

import json
from abc import abstractmethod
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.hub_access import asking
from tove_llava.core.safe_loading import from_pretrained, loading
from tove_llava.core.sources import BundledSource, Source
from tove_llava.experts.base import Expert
from tove_llava.experts.dense import DENSE, DenseArchitecture

_ARCHITECTURES = Path(__file__).with_name("architectures.yaml")  # public configurations, known without a network
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as preprocessor_config.json has them


class DenseExpert(Expert):
    """Reads ``hf:`` and ``bundled:`` folders of a registered dense architecture (:mod:`tove_llava.experts.dense`).

    Mode "features" builds and runs the encoder; mode "map" the whole network, whose raw prediction :meth:`to_map`
    turns into this expert's map.

    Options:
        stage: for hierarchical encoders, the stage whose tokens are returned.
        map_size: [rows, columns] or pixels per side of the resized map (default: the network's size).
    """

    modes = ("features", "map")
    option_names: ClassVar[tuple[str, ...]] = ("stage", "map_size")
    map_options: ClassVar[tuple[str, ...]] = ("map_size",)  # not for the network

    architecture: DenseArchitecture
    preprocessor: dict[str, Any]
    _use_table = True

    @abstractmethod
    def to_map(self, prediction: Tensor) -> Tensor:
        """Turn a raw prediction [B,C,h,w] in float32 into the expert's map [B,c,h,w]."""

    def configure(self) -> int | None:
        config, self.preprocessor = read_configuration(self.source, self.spec.revision, self._use_table)
        self.configuration = str(config)
        names = config.architectures or ["(none)"]
        options = {key: value for key, value in self.spec.options.items() if key not in self.map_options}
        self.architecture = DENSE.get(names[0])(config, options, whole=self.spec.mode == "map")
        read = self.preprocessor
        if read.get("do_normalize", True):
            self.mean = tuple(read.get("image_mean", self.mean))
            self.std = tuple(read.get("image_std", self.std))
        else:
            self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.interpolation = _RESAMPLE.get(read.get("resample", 3), f"resample={read.get('resample')}")
        size = read.get("size")
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        return size

    def load(self) -> None:
        self._use_table = self.is_random  # weights come with their own configuration
        super().load()

    def build(self, pretrained: bool) -> nn.Module:
        reader = self.architecture
        if not pretrained:
            return reader.model_class(reader.config, **reader.model_kwargs)
        model, info = from_pretrained(
            reader.model_class,
            self.source,
            f"expert {self.name!r}",
            config=reader.config,
            revision=self.spec.revision or "main",
            dtype=torch.float32,
            output_loading_info=True,
            **reader.model_kwargs,
        )
        missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
        if missing:
            raise CheckpointError(f"expert {self.name!r}: {self.source} has no weights for {', '.join(missing[:5])}")
        return model

    def features(self, pixels: Tensor) -> Tensor:
        if self.spec.mode == "features":
            return self.architecture.encode(self.network, pixels)
        prediction = self.to_map(self.architecture.predict(self.network, pixels).float())
        size = self.option("map_size")
        if size is not None:
            prediction = nn.functional.interpolate(prediction, size, mode="bilinear", antialias=True)
        return prediction.to(pixels.dtype)

    def hub_file(self) -> tuple[str, str] | None:
        return (self.source.target, "model.safetensors") if self.source.path is None else None

    def licence(self) -> str:
        if isinstance(self.source, BundledSource):
            return "Apache-2.0 (this project's own)"
        known = _architectures().get(str(self.source))
        return known["licence"] if known else super().licence()

    def set_attention(self, implementation: str) -> None:
        with suppress(ValueError):  # an architecture without it keeps its own
            self.network.set_attn_implementation(implementation)

    def save_backbone(self, folder: Path) -> Source:
        self.network.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(self.preprocessor, indent=2) + "\n")
        return self.source.at(folder)


@cache
def _architectures() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(_ARCHITECTURES.read_text())


def read_configuration(
    source: Source, revision: str | None, use_table: bool
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Read the configurations of the model and its image processor.

    With ``use_table`` this package's table gives those of a well-known repository: shapes are known without a network.
    """
    known = _architectures().get(str(source)) if use_table else None
    if known is not None:
        return AutoConfig.for_model(**known["config"]), dict(known["preprocessor"])
    config = from_pretrained(AutoConfig, source, "an expert's configuration", revision=revision or "main")
    name = source.pretrained()["pretrained_model_name_or_path"]
    hint = "save the image processor next to the weights (image_mean, image_std, size)"
    with loading("preprocessor_config.json", source, hint), asking(None if source.path else name):
        file = cached_file(name, "preprocessor_config.json", revision=revision or "main")
    return config, read_json_object(str(file), ConfigError, hint)
