"""Public data sets as data: source, licence, layout and expected content.

Each has one YAML file in this folder, named after the benchmark if it is one::

    title: POPE (Li et al. 2023, arXiv 2305.10355)
    kind: benchmark                     # or training
    homepage: https://...
    licence: MIT                        # as the publisher states it
    root: playground/data/eval          # LLaVA's folder for it
    parts:                              # files and folders under the root
      - path: pope/llava_pope_test.jsonl
        archive: eval.zip               # the archive that holds it (optional)
        url: https://...
      - path: pope/val2014/             # a folder ends with a slash
        archive: val2014.zip
        url: https://...
        bytes: 6645013297               # of the download
        digest: sha256:fe9b...          # of the download
    questions: 8910                     # expected number, if a source states it
    images: 500                         # distinct images of the questions
    groups: {random: 2910}              # questions of each category
    stated: the publisher's size, if it is no exact number
    notes: [remarks for users]
    sources: [pages that state all this]

A training set also names its ``records`` file and ``image_folder``, relative to the root; its questions are records.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import yaml

from tove_llava.core.errors import ConfigError
from tove_llava.core.mappings import from_mapping
from tove_llava.core.registry import closest

BENCHMARK, TRAINING = "benchmark", "training"


@dataclass(frozen=True)
class Part:
    """One file or folder of a set.

    Attributes:
        path: relative to the set's root; a folder ends with a slash.
        url: download of the part or of its archive.
        archive: file name of that archive; empty for a file without one.
        bytes: size of the download.
        digest: "algorithm:hexadecimal" of the download.
        instead: other paths under the root of the same file.
        note: how to make or place it, if that takes more than unpacking.
    """

    path: str
    url: str = ""
    archive: str = ""
    bytes: int | None = None
    digest: str = ""
    instead: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_folder(self) -> bool:
        return self.path.endswith("/")

    def is_at(self, path: Path) -> bool:
        """Tell if a path is the file, or a non-empty folder."""
        return path.is_dir() and any(path.iterdir()) if self.is_folder else path.is_file()

    def found(self, root: Path) -> Path | None:
        """Find its path under ``root``, or None."""
        return next((root / path for path in (self.path, *self.instead) if self.is_at(root / path)), None)


@dataclass(frozen=True)
class DataSet:
    """One public data set; fields as in its file."""

    name: str
    title: str
    kind: str
    homepage: str
    licence: str
    root: str
    parts: tuple[Part, ...]
    sources: tuple[str, ...]
    questions: int | None = None
    images: int | None = None
    groups: Mapping[str, int] | None = None
    stated: str = ""
    notes: tuple[str, ...] = ()
    records: str = ""
    image_folder: str = ""

    @cached_property
    def download_bytes(self) -> int | None:
        """Add up distinct downloads; None if no source gives a size."""
        sizes = {part.url: part.bytes for part in self.parts if part.bytes is not None}
        return sum(sizes.values()) if sizes else None


def set_names() -> list[str]:
    """List the names of all sets, sorted."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def get_set(name: str) -> DataSet:
    """Return a set by name; ConfigError if it is unknown or malformed."""
    names = set_names()
    if name not in names:
        raise ConfigError(f"unknown data set {name!r}.{closest(name, names)} Available: {', '.join(names)}")
    content = yaml.safe_load(resources.files(__name__).joinpath(f"{name}.yaml").read_text("utf-8"))
    found = from_mapping(DataSet, content, f"data set {name}", name=name)
    if found.kind not in (BENCHMARK, TRAINING):
        raise ConfigError(f"data set {name}: kind must be {BENCHMARK} or {TRAINING}, not {found.kind!r}")
    return found
