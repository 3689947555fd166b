"""Read features that a frozen tower computed once for several runs.

A folder holds ``images.json`` (names of the images in order, how values are stored), ``pictures/`` (fingerprints of
the image files), and for CLIP and each expert a folder with ``part.json`` (its origin) and shards of features. A run
reads the parts that its tower has. It refuses a part of another source, layer or input size, a part that was computed
in 16 bits by another dtype than its own, and images or local weights whose files have changed.

CLIP's tokens are in the part ``clip``; no expert can have that name. :mod:`tove_llava.train.feature_filling` fills a
cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.files import read_json, read_json_object, write_atomically
from tove_llava.core.json_text import plain
from tove_llava.core.sources import Source
from tove_llava.tower import ToveVisionConfig, TowerFeatures
from tove_llava.train.feature_stores import STORES, Shards
from tove_llava.train.file_fingerprints import file_fingerprint, has_changed, source_files

CLIP = "clip"
FILES = "files"  # key of part.json: fingerprints of weights
DTYPE = "dtype"  # key of part.json: dtype of the encoders' computation
FLOAT32 = "float32"

REMAKE = "delete the cache and make it again with 'tove-llava features'"
AGAIN = "make another cache with 'tove-llava features'"


class FeatureCache:
    """Features that :func:`~tove_llava.train.feature_filling.fill_cache` wrote.

    Args:
        config: of the tower that will take the features.
        aspect_ratio: how the run brings images to the tower's size.
        image_folder: folder of images to compare with those of the cache; images that are gone are not compared.
        dtype: of the run's own encoders; features of float32 serve every run.

    Raises:
        ConfigError: a part or shard is missing, or was computed in another way than this tower would.
        DataError: an image file has changed.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ToveVisionConfig,
        aspect_ratio: str,
        image_folder: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.folder = Path(folder)
        layout = Layout.read(self.folder)
        if layout.image_aspect_ratio != aspect_ratio:
            raise ConfigError(
                f"{self.folder} was made with image_aspect_ratio {layout.image_aspect_ratio!r}, the run has "
                f"{aspect_ratio!r}; make another cache, or give --image_aspect_ratio {layout.image_aspect_ratio}"
            )
        self._rows = {name: row for row, name in enumerate(layout.images)}
        self._parts: dict[str, Shards] = {}
        for name, description in describe_parts(config, dtype).items():
            made_in = read_description(self.folder, name)[DTYPE]
            if made_in not in (FLOAT32, description[DTYPE]):
                raise ConfigError(
                    f"{self.folder}: {name} was computed in {made_in}, and this run computes in {description[DTYPE]}; "
                    f"make another cache with 'tove-llava features --dtype {description[DTYPE]}'"
                )
            check_part(self.folder, name, {**description, DTYPE: made_in})
            files = [shard_file(self.folder, name, shard) for shard in range(layout.shards)]
            there = {entry.name for entry in os.scandir(self.folder / name)}
            missing = [file for file in files if file.name not in there]
            if missing:
                raise ConfigError(
                    f"{self.folder} is not complete: {missing[0]} and {len(missing) - 1} other shards of {name} are "
                    "missing; give the same 'tove-llava features' command again"
                )
            self._parts[name] = Shards(files, layout.shard_images, layout.store)
        if image_folder is not None:
            for shard in range(layout.shards):
                check_images(self.folder, layout, shard, Path(image_folder))

    def read(self, images: Sequence[str]) -> TowerFeatures:
        """Return the features of named images, in float16 or float32.

        Raises:
            DataError: an image is not in the cache, or a file of the cache is damaged.
        """
        missing = [name for name in images if name not in self._rows]
        if missing:
            raise DataError(
                f"{self.folder} has no features of image {missing[0]!r}; make them with tove-llava features"
            )
        rows = [self._rows[name] for name in images]
        arrays = {name: part.read(rows) for name, part in self._parts.items()}
        arrays[CLIP] = np.ascontiguousarray(arrays[CLIP].swapaxes(1, 2))  # stored by channel, [B,d,N]
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return TowerFeatures(base=tensors.pop(CLIP), experts=tensors)


@dataclass(frozen=True)
class Layout:
    """The content of ``images.json``."""

    image_aspect_ratio: str  # how images were brought to the tower's size
    store: str  # key of STORES
    shard_images: int  # images of a shard; the last one may have fewer
    images: list[str]  # names, in the order of rows

    @property
    def shards(self) -> int:
        return -(-len(self.images) // self.shard_images)

    def of(self, shard: int) -> list[str]:
        """Return the names of a shard's images."""
        return self.images[shard * self.shard_images : (shard + 1) * self.shard_images]

    @staticmethod
    def file(folder: Path) -> Path:
        return folder / "images.json"

    @classmethod
    def read(cls, folder: Path) -> Layout:
        """Read the layout of a cache.

        Raises:
            ConfigError: it is missing, damaged, or of another version of this package.
        """
        file = cls.file(folder)
        found = read_json(file, ConfigError, REMAKE)
        try:
            layout = cls(**found)
            usable = layout.store in STORES and layout.shard_images > 0 and isinstance(layout.images, list)
        except TypeError:
            usable = False
        if not usable:
            raise ConfigError(
                f"{file} is damaged, or of another version of tove_llava; delete the cache and make it again"
            )
        return layout

    def write(self, folder: Path) -> None:
        write_json(self.file(folder), asdict(self))


def shard_file(folder: Path, part: str, shard: int) -> Path:
    return folder / part / f"{shard:06d}.safetensors"


def prints_file(folder: Path, shard: int) -> Path:
    """Return the file with the fingerprints of a shard's images."""
    return folder / "pictures" / f"{shard:06d}.json"


def describe_parts(config: ToveVisionConfig, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Return the origin of each part's values, computed in ``dtype``.

    Raises:
        ConfigError: an expert has a name that the cache uses itself.
    """
    reserved = sorted({CLIP, "pictures"} & set(config.expert_names))
    if reserved:
        raise ConfigError(f"an expert named {reserved[0]!r} cannot be cached; give it another name")
    common = {
        "image_size": config.image_size,
        "mean": list(config.image_mean),
        "std": list(config.image_std),
        DTYPE: str(dtype).removeprefix("torch."),
    }
    clip = {"source": config.clip_source, "revision": config.clip_revision, "layer": config.num_clip_layers}
    parts = {CLIP: {**common, **clip}}
    for spec in config.expert_specs:
        if spec.name in config.attached_experts:
            parts[spec.name] = {**common, **spec.to_dict()}
    return plain(parts)


def check_images(folder: Path, layout: Layout, shard: int, image_folder: Path) -> None:
    """Refuse a shard whose images have changed."""
    file, images = prints_file(folder, shard), layout.of(shard)
    prints = read_json(file, ConfigError, REMAKE)
    if not isinstance(prints, list) or len(prints) != len(images):
        raise ConfigError(f"{file} is damaged; delete the cache and make it again")
    for name, recorded in zip(images, prints, strict=True):
        if has_changed(image_folder / name, recorded):
            raise DataError(
                f"{folder} is stale: {image_folder / name} is not the image that its features were computed from; "
                f"{AGAIN}"
            )


def check_part(folder: Path, part: str, description: dict[str, Any]) -> None:
    """Refuse a part of another origin, or of changed local weights."""
    found = read_description(folder, part)
    prints = found.pop(FILES, {})
    odd = sorted(key for key in description.keys() | found.keys() if description.get(key) != found.get(key))
    if odd:
        raise ConfigError(f"{folder}: {part} was computed from another source ({', '.join(odd)} differ); {AGAIN}")
    # A source that was not local has no recorded files, and nothing is compared.
    files = source_files(Source.parse(found["source"]).path) if prints else {}
    for name, file in files.items():
        if name not in prints or has_changed(file, prints[name]):
            raise ConfigError(f"{folder} is stale: {file} has changed since {part} was computed from it; {AGAIN}")


def read_description(folder: Path, part: str) -> dict[str, Any]:
    """Read the recorded origin of a part.

    Raises:
        ConfigError: its file is missing or damaged.
    """
    found = read_json_object(folder / part / "part.json", ConfigError, REMAKE)
    return {DTYPE: FLOAT32, **found}  # of a cache from before dtype was a setting


def write_part(folder: Path, part: str, description: dict[str, Any]) -> None:
    """Record the origin of a part."""
    files = source_files(Source.parse(description["source"]).path)
    weights = {file: file_fingerprint(path) for file, path in files.items()}
    write_json(folder / part / "part.json", {**description, FILES: weights})


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomically(file, json.dumps(value, indent=1))
