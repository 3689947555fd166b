"""What a dense architecture has to say: which class to build, where its tokens are, and its raw prediction."""

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
    """Class decorator: the architecture of checkpoints whose config names one of ``class_names``."""

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
        whole: build the decoder too; else the encoder alone where the library has a class for it.
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
        """The transformers class to build."""

    model_kwargs: dict[str, Any] = {}  # further arguments of the class, beside the config

    @abstractmethod
    def encode(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """[B,3,S,S] -> tokens [B,d,h,w]; runs no decoder."""

    @abstractmethod
    def predict(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """[B,3,S,S] -> raw prediction [B,C,h,w] (logits, or depth as the model gives it)."""


def tokens_to_map(tokens: Tensor, pixels: Tensor, patch_size: int) -> Tensor:
    """[B, prefix + h*w, d] -> [B,d,h,w], where h and w follow from the pixels and the patch size."""
    h, w = pixels.shape[-2] // patch_size, pixels.shape[-1] // patch_size
    return tokens[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))


def choose(index: int, count: int, key: str) -> int:
    """``index`` counted as in a list of ``count``.

    Raises:
        ConfigError: it is not in the list; the message names the option ``key``.
    """
    if not isinstance(index, int) or not -count <= index < count:
        raise ConfigError(f"option {key}={index!r} must be from {-count} to {count - 1}")
    return index % count
