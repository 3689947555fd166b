"""The registry of checkpoint formats, each with ``read`` and ``write``."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from tove_llava.checkpoints.parts import LlavaParts, TowerPart
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.model_sizes import read_model_config
from tove_llava.core.registry import Registry

FORMATS: Registry[type[LlavaFormat]] = Registry("checkpoint format", "tove_llava.checkpoints.formats")

OWN = "tove"

F = TypeVar("F", bound="type[LlavaFormat]")


@dataclass(frozen=True)
class Request:
    """The user's settings, beyond the folder.

    Attributes:
        base: source of the language model, for folders that hold none.
        clip: source of CLIP, if the folder names none or one that does not exist.
        template: conversation template; the format's own default if None.
        preset: gives the tower its experts and fusion; None leaves it only CLIP.
        dtype: of the written weights; by default that of the language model in training.
        bos: what writes a chat's beginning-of-text token, "template" or "tokenizer".
        self_contained: write CLIP and the experts too.
        out: final path of the written folder.
    """

    base: str | None = None
    clip: str | None = None
    template: str | None = None
    preset: Any = None
    dtype: str | None = None
    bos: str = "template"
    self_contained: bool = False
    out: Path | None = None


class LlavaFormat(ABC):
    """One kind of folder, registered with :func:`register_format` in its own file."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""  # one line for the command's help
    honours: ClassVar[tuple[str, ...]] = ("base", "clip", "template")  # the request's fields that writing depends on

    def detect(self, folder: Path, config: dict[str, Any]) -> bool:
        """Return whether a folder has this format, complete or not.

        Args:
            config: its ``config.json``, empty if there is none.
        """
        return False

    def read(self, folder: Path, request: Request) -> LlavaParts:
        """Read configurations and tokenizer, and map the weights.

        Raises:
            CheckpointError: the folder is incomplete or damaged.
            ConfigError: it is a kind of model that LLaVA-1.5 is not; or a flag is missing or wrong.
        """
        raise ConfigError(f"{folder}: the format {self.name} is only written")

    def read_tower(self, folder: Path, request: Request) -> TowerPart:
        """Read CLIP without the language model's tokenizer or source; errors as in :meth:`read`."""
        parts = self.read(folder, request)
        return TowerPart(parts.clip, parts.image_aspect_ratio)

    def open(self, folder: Path, request: Request) -> Any:
        """Open a folder of any format as its parts, for :meth:`write`."""
        reader = find_format(folder)
        if reader.name == self.name and request.preset is None:
            raise ConfigError(f"{folder} already has the format {self.name}")
        return read_parts(folder, request)

    @abstractmethod
    def write(self, source: Any, folder: Path, request: Request) -> None:
        """Write everything into the empty ``folder``, and add to ``source.remarks``.

        Raises:
            ConfigError: this format cannot hold such a model.
            CheckpointError: what was written is not what the model is.
        """


def register_format(name: str) -> Callable[[F], F]:
    """Return a class decorator that registers a format under ``name``."""
    return FORMATS.register_class(name)


def find_format(folder: Path) -> LlavaFormat:
    """Return the format of a folder.

    Raises:
        CheckpointError: there is no folder, its config.json is damaged, or its format is unknown.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; a repository of the hub has to be downloaded first: hf download NAME "
            "--local-dir FOLDER"
        )
    config = read_model_config(folder)
    found = _detected(folder, config)
    if found is not None:
        return found
    if not config:
        raise CheckpointError(f"{folder} holds no config.json: it is no checkpoint, or an unfinished copy of one")
    readable = [name for name in FORMATS if FORMATS.get(name).detect is not LlavaFormat.detect]
    raise CheckpointError(
        f"{folder} is not a LLaVA checkpoint: its config.json says model_type {config.get('model_type')!r}. Known "
        f"formats: {', '.join(readable)}"
    )


def read_parts(folder: Path, request: Request) -> LlavaParts:
    """Read a folder of any format, as :meth:`LlavaFormat.read`; check every tensor."""
    parts = find_format(folder).read(folder, request)
    parts.check()
    return parts


def foreign_format(folder: Path) -> str | None:
    """Return the name of a folder's foreign format, or None.

    Raises:
        CheckpointError: its config.json is damaged.
    """
    found = _detected(folder, read_model_config(folder))
    return None if found is None or found.name == OWN else found.name


def check_request(writer: LlavaFormat, request: Request) -> None:
    """Raise ConfigError for a setting that a format does not honour."""
    for field in dataclasses.fields(request):
        given = getattr(request, field.name) != field.default
        if given and field.name not in ("out", *writer.honours):
            fitting = [name for name in FORMATS if field.name in FORMATS.get(name).honours]
            raise ConfigError(
                f"--{field.name} does not apply to the format {writer.name}, but to {' and '.join(fitting)} "
                f"(--to {fitting[0]})"
            )


def _detected(folder: Path, config: dict[str, Any]) -> LlavaFormat | None:
    candidates = (FORMATS.get(name)() for name in FORMATS)
    return next((candidate for candidate in candidates if candidate.detect(folder, config)), None)
