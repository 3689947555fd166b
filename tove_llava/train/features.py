"""Features computed once: what a frozen tower gives for each image, on disk, for several runs over the same images.

A folder holds ``images.json`` (names of the images, in order, fingerprints of their files, and how they were brought
to pixels) and for CLIP and each expert two files: ``<part>.npy``, mapped into memory when it is read, and
``<part>.json``, what it was computed from. A run reads the parts that its tower has; a part of another source, layer
or input size is refused, and so are pictures or local weights whose files have changed since.

CLIP's tokens are in the part ``clip``; an expert must not have that name.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm

from tove_llava.data.images import AspectRatio, ImageTransform, resolve_image
from tove_llava.errors import ConfigError, DataError
from tove_llava.sources import Source
from tove_llava.tower import ToveVisionConfig, ToveVisionModel, TowerFeatures
from tove_llava.train.fingerprint import Fingerprint, fingerprint, has_changed, source_files

CLIP = "clip"
IMAGES = "images.json"
FILES = "files"  # fingerprints, in images.json and in each part's description

logger = logging.getLogger(__name__)


class FeatureCache:
    """Reads features that :func:`fill_cache` wrote.

    Args:
        folder: the cache.
        config: of the tower that will take the features.
        aspect_ratio: how the run brings pictures to the tower's size.
        image_folder: where the pictures are, if they are to be compared with those of the cache; pictures that are
            not there any more are not missed.

    Raises:
        ConfigError: a part is missing, or was computed otherwise than this tower would.
        DataError: a picture's file has changed since.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ToveVisionConfig,
        aspect_ratio: str,
        image_folder: str | Path | None = None,
    ) -> None:
        self.folder = Path(folder)
        made = _read_json(self.folder / IMAGES)
        if made["image_aspect_ratio"] != aspect_ratio:
            raise ConfigError(
                f"{self.folder} was made with image_aspect_ratio {made['image_aspect_ratio']!r}, the run has "
                f"{aspect_ratio!r}; make another cache, or give --image_aspect_ratio {made['image_aspect_ratio']}"
            )
        if image_folder is not None:
            _check_pictures(self.folder, made, Path(image_folder))
        self._rows = {name: row for row, name in enumerate(made["images"])}
        self._parts: dict[str, np.ndarray] = {}
        for name, description in _parts(config).items():
            found = _read_json(self.folder / f"{name}.json")
            _check_source(self.folder, name, found.get("source", ""), found.pop(FILES, {}))
            odd = sorted(key for key in description.keys() | found.keys() if description.get(key) != found.get(key))
            if odd:
                raise ConfigError(
                    f"{self.folder}: {name} was computed from another source ({', '.join(odd)} differ); "
                    "make another cache with 'tove-llava features'"
                )
            self._parts[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def read(self, images: Sequence[str]) -> TowerFeatures:
        """Features of images by name; float32, or what the cache was stored in.

        Raises:
            DataError: an image is not in the cache.
        """
        missing = [name for name in images if name not in self._rows]
        if missing:
            raise DataError(
                f"{self.folder} has no features of image {missing[0]!r}; make them with tove-llava features"
            )
        rows = [self._rows[name] for name in images]
        tensors = {name: torch.from_numpy(np.stack([part[row] for row in rows])) for name, part in self._parts.items()}
        return TowerFeatures(base=tensors.pop(CLIP), experts=tensors)


def fill_cache(
    folder: str | Path,
    tower: ToveVisionModel,
    images: Sequence[str],
    image_folder: str | Path,
    *,
    aspect_ratio: str,
    batch_size: int = 32,
    dtype: str = "float32",
) -> int:
    """Computes what the cache lacks and returns its size in bytes; parts that are complete are kept.

    Args:
        images: names as records call them, relative to ``image_folder``; no duplicates.
        aspect_ratio: ``"square"`` or ``"pad"``.
        dtype: stored floating-point type, ``"float32"`` or ``"float16"``.

    Raises:
        ConfigError: the folder is a cache of other images, or of a tower whose local weights have changed since.
        DataError: an image cannot be read, or its file has changed since. NonFiniteError: an expert fails on one.
    """
    folder, config = Path(folder), tower.config
    if CLIP in config.expert_names:
        raise ConfigError(f"an expert named {CLIP!r} cannot be cached; give it another name")
    folder.mkdir(parents=True, exist_ok=True)
    made = {"image_aspect_ratio": aspect_ratio, "images": list(images)}
    if (folder / IMAGES).exists():
        found = _read_json(folder / IMAGES)
        if {key: found.get(key) for key in made} != made:
            raise ConfigError(f"{folder} is a cache of other images; give another folder")
        _check_pictures(folder, found, Path(image_folder))
    else:
        prints = [fingerprint(resolve_image(image_folder, name)) for name in images]
        _write(folder / IMAGES, {**made, FILES: prints})
    wanted = _parts(config)
    lacking = [name for name in wanted if not (folder / f"{name}.json").exists()]
    if lacking:
        _compute(folder, tower, list(images), Path(image_folder), lacking, aspect_ratio, batch_size, dtype)
        for name in lacking:
            os.replace(folder / f"{name}.npy.part", folder / f"{name}.npy")
            files = source_files(Source.parse(wanted[name]["source"]).path)
            weights = {file: fingerprint(path) for file, path in files.items()}
            _write(folder / f"{name}.json", {**wanted[name], FILES: weights})
    FeatureCache(folder, config, aspect_ratio)  # what was there before may be another tower's
    return sum((folder / f"{name}.npy").stat().st_size for name in wanted)


def _compute(
    folder: Path,
    tower: ToveVisionModel,
    images: list[str],
    image_folder: Path,
    lacking: list[str],
    aspect_ratio: str,
    batch_size: int,
    dtype: str,
) -> None:
    config = tower.config
    transform = ImageTransform(
        config.image_size, cast(AspectRatio, aspect_ratio), mean=config.image_mean, std=config.image_std
    )
    names = [name for name in lacking if name != CLIP]
    files: dict[str, np.memmap] = {}
    for start in tqdm(range(0, len(images), batch_size), desc="features", unit="batch"):
        batch = images[start : start + batch_size]
        pixels = torch.stack([transform.open(resolve_image(image_folder, name)) for name in batch])  # [B,3,S,S]
        features = tower.frozen.encode(pixels.to(tower.device, tower.dtype), names, strict=True)
        tensors = {CLIP: features.base, **features.experts}
        for name in lacking:
            values = tensors[name].float().cpu().numpy().astype(dtype)
            if name not in files:
                file = folder / f"{name}.npy.part"
                shape = (len(images), *values.shape[1:])
                files[name] = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
            files[name][start : start + len(batch)] = values
    for mapped in files.values():
        mapped.flush()


def _parts(config: ToveVisionConfig) -> dict[str, dict[str, Any]]:
    """What each part's values follow from, by part."""
    common = {"image_size": config.image_size, "mean": list(config.image_mean), "std": list(config.image_std)}
    clip = {"source": config.clip_source, "revision": config.clip_revision, "layer": config.num_clip_layers}
    parts = {CLIP: {**common, **clip}}
    for spec in config.expert_specs:
        if spec.name in config.attached_experts:
            parts[spec.name] = {**common, **spec.to_dict()}
    return json.loads(json.dumps(parts))


def _check_pictures(folder: Path, made: dict[str, Any], image_folder: Path) -> None:
    """Refuses a cache whose pictures have been replaced."""
    prints = made.get(FILES)
    if prints is None:
        logger.warning("%s is of an earlier version and does not tell whether pictures have changed since", folder)
        return
    if len(prints) != len(made["images"]):
        raise ConfigError(f"{folder / IMAGES} is damaged; delete the cache and make it again")
    for name, recorded in zip(made["images"], prints, strict=True):
        if has_changed(image_folder / name, recorded):
            raise DataError(
                f"{folder} is stale: {image_folder / name} is not the picture that its features were computed from; "
                "make another cache with 'tove-llava features'"
            )


def _check_source(folder: Path, part: str, source: str, prints: dict[str, Fingerprint]) -> None:
    """Refuses a part whose local weights have been replaced; without recorded files there is nothing to compare."""
    files = source_files(Source.parse(source).path) if prints else {}
    for name, file in files.items():
        if name not in prints or has_changed(file, prints[name]):
            raise ConfigError(
                f"{folder} is stale: {file} has changed since {part} was computed from it; "
                "make another cache with 'tove-llava features'"
            )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {file}; make the cache with 'tove-llava features'") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is damaged ({error}); delete the cache and make it again") from None


def _write(file: Path, value: Any) -> None:
    staged = file.with_name(file.name + ".part")
    staged.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(staged, file)
