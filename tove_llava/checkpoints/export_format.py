"""What an export format has to say."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from transformers import LlavaProcessor

from tove_llava.core.registry import Registry

FORMATS: Registry[type["ExportFormat"]] = Registry("export format", "tove_llava.checkpoints.formats")

F = TypeVar("F", bound=type["ExportFormat"])


@dataclass(frozen=True)
class ExportSource:
    """A loaded checkpoint on its way out.

    Attributes:
        folder: the checkpoint.
        model: a ``ToveLlavaForConditionalGeneration`` on the CPU, adapters merged, backbones loaded.
        processor: its processor.
        template: registered name of its conversation template.
        image_aspect_ratio: how it was shown pictures, "pad" or "square".
        language_source: where its language model came from.
        stage, preset: of the training run.
        chat_begins: whether the chat template writes the tokens that begin a text; else it is left to the tokenizer.
    """

    folder: Path
    model: Any
    processor: LlavaProcessor
    template: str
    image_aspect_ratio: str
    language_source: str
    stage: str
    preset: str
    chat_begins: bool = True


class ExportFormat(ABC):
    """One kind of folder. A subclass registers itself with :func:`register_format`, in a file of its own."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""  # one line for the command's help

    @abstractmethod
    def check(self, config: Any) -> None:
        """Looks at a checkpoint's ``ToveLlavaConfig`` before any weight is loaded.

        Raises:
            ConfigError: this format cannot hold such a model; the message says what to do.
        """

    @abstractmethod
    def write(self, source: ExportSource, folder: Path) -> list[str]:
        """Writes everything into the empty ``folder``.

        Returns:
            what a user has to know of this export beyond the documentation, one sentence each.

        Raises:
            CheckpointError: what was written is not what the model is.
        """


def register_format(name: str) -> Callable[[F], F]:
    """Return a class decorator that registers a format under ``name``."""
    return FORMATS.register_class(name)


def format_names() -> list[str]:
    """Names of all formats."""
    return FORMATS.names()
