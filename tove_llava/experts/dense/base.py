"""The contract of a dense architecture: class, tokens and raw prediction."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tove_llava.core.errors import ConfigError
from tove_llava.core.registry import Registry

DENSE: Registry[type["DenseArchitecture"]] = Registry("dense architecture", "tove_llava.experts.dense")

A = TypeVar("A", bound="type[DenseArchitecture]")


def register_dense(*class_names: str) -> Callable[[A], A]:
    """Register a class for checkpoints whose config names one of ``class_names``."""

    def add(cls: A) -> A:
        for name in class_names:
            DENSE.register(name)(cls)
        return cls

    return add


class DenseArchitecture(ABC):
    """Reads one family of dense-prediction models.

    Args:
        config: the checkpoint's own configuration; a subclass may shorten it so that no unused layer is built.
        options: the spec's options (``stage`` or ``layer``).
        whole: build the decoder too; otherwise only the encoder, if the library has a class for it.
    """

    option_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: PretrainedConfig, options: dict[str, Any], whole: bool) -> None:
        for key in options:
            if key not in self.option_names:
                raise ConfigError(
                    f"unknown option {key!r} for {config.architectures}; known: "
                    f"{', '.join(self.option_names) or 'none'}"
                )
        self.config, self.options, self.whole = config, options, whole

    @property
    @abstractmethod
    def model_class(self) -> type[PreTrainedModel]:
        """Return the transformers class to build."""

    model_kwargs: dict[str, Any] = {}  # further arguments of the class

    @abstractmethod
    def encode(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Encode [B,3,S,S] as tokens [B,d,h,w], without a decoder."""

    @abstractmethod
    def predict(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Predict [B,C,h,w] from [B,3,S,S] (logits, or the model's depth)."""


def tokens_to_map(tokens: Tensor, pixels: Tensor, patch_size: int) -> Tensor:
    """Turn [B, prefix + h*w, d] into the pixels' grid, [B,d,h,w]."""
    h, w = pixels.shape[-2] // patch_size, pixels.shape[-1] // patch_size
    return tokens[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))
