"""Fill a feature cache, in processes that share its shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm

from tove_llava.core.errors import BusyError, ConfigError
from tove_llava.core.locks import is_locked, locked
from tove_llava.data.images import AspectRatio, ImageTransform, resolve_image
from tove_llava.tower import ToveVisionModel
from tove_llava.train.feature_cache import (
    AGAIN,
    CLIP,
    Layout,
    check_images,
    check_part,
    describe_parts,
    prints_file,
    shard_file,
    write_json,
    write_part,
)
from tove_llava.train.feature_stores import STORES, write_shard
from tove_llava.train.file_fingerprints import Fingerprint, file_fingerprint

SHARD_IMAGES = 256

Opened = tuple[torch.Tensor, Fingerprint]  # pixels [3,S,S], and the file's fingerprint


@dataclass(frozen=True)
class Filled:
    """Bytes of features in a cache, and shards of other processes."""

    size: int
    missing: int


def fill_cache(
    folder: str | Path,
    tower: ToveVisionModel,
    images: Sequence[str],
    image_folder: str | Path,
    *,
    aspect_ratio: str,
    store: str = "float32",
    share: tuple[int, int] = (0, 1),
    batch_size: int = 32,
    shard_images: int = SHARD_IMAGES,
    workers: int = 4,
) -> Filled:
    """Compute the shards that a cache lacks; load the backbones first.

    Args:
        images: names as in the records, relative to ``image_folder``, without duplicates.
        aspect_ratio: ``"square"`` or ``"pad"``.
        store: key of :data:`~tove_llava.train.feature_stores.STORES`.
        share: number of this process, and of all processes; their shards alternate.
        batch_size: images at a time.
        shard_images: images of one file, which is in memory until it is written.
        workers: threads that open images.

    Raises:
        BusyError: another process computes these shards.
        CheckpointError: the folder cannot be written.
        ConfigError: the folder is a cache of other images, with another store, or of a tower whose source or local
            weights have changed; or a value cannot be stored like this.
        DataError: an image cannot be read, or its file has changed.
        NonFiniteError: an expert fails on an image.
    """
    folder, config = Path(folder), tower.config
    parts = describe_parts(config, tower.dtype)
    with _locked_share(folder, share):
        layout = _layout(folder, Layout(aspect_ratio, store, shard_images, list(images)))
        work = _lacking(folder, layout, parts, share, Path(image_folder))
        tower.load_backbones()
        transform = ImageTransform(
            config.image_size, cast(AspectRatio, aspect_ratio), mean=config.image_mean, std=config.image_std
        )

        def opened(name: str) -> Opened:
            file = resolve_image(image_folder, name)
            return transform.open(file), file_fingerprint(file)

        with ThreadPoolExecutor(workers, thread_name_prefix="images") as pool:
            decoded = _ahead(pool, opened, (name for shard in work for name in layout.of(shard)), 2 * batch_size)
            with tqdm(desc="features", unit="image", total=sum(len(layout.of(shard)) for shard in work)) as progress:
                for shard, lacking in work.items():
                    _fill_shard(folder, tower, layout, shard, lacking, decoded, batch_size, progress)
    files = [shard_file(folder, name, shard) for name in parts for shard in range(layout.shards)]
    sizes = [file.stat().st_size for file in files if file.exists()]
    return Filled(size=sum(sizes), missing=len(files) - len(sizes))


@contextmanager
def _locked_share(folder: Path, share: tuple[int, int]) -> Iterator[None]:
    """Lock the shards of one process."""
    number, count = share
    with locked(folder, f".share-{number}-of-{count}.lock"):
        for other in folder.glob(".share-*.lock"):
            if not other.name.endswith(f"-of-{count}.lock") and is_locked(other):
                raise BusyError(f"{folder} is being filled in other shares ({other.name}); wait for their end")
        yield


def _lacking(
    folder: Path, layout: Layout, parts: Mapping[str, dict[str, Any]], share: tuple[int, int], image_folder: Path
) -> dict[int, list[str]]:
    """Check a cache, begin its new parts, and return what each shard lacks."""
    for name, description in parts.items():
        if (folder / name / "part.json").exists():
            check_part(folder, name, description)
        elif (folder / name).exists() and any((folder / name).glob("*.safetensors")):
            raise ConfigError(f"{folder / name} does not say what it was computed from; delete that folder")
        else:
            write_part(folder, name, description)
    work = {}
    for shard in range(share[0], layout.shards, share[1]):
        known = prints_file(folder, shard).exists()
        if known:
            check_images(folder, layout, shard, image_folder)
        if lacking := [name for name in parts if not (known and shard_file(folder, name, shard).exists())]:
            work[shard] = lacking
    return work


def _layout(folder: Path, wanted: Layout) -> Layout:
    """Begin a cache, or continue the existing one."""
    if wanted.store not in STORES:
        raise ConfigError(f"unknown store {wanted.store!r} of features; known: {', '.join(STORES)}")
    if not Layout.file(folder).exists():
        wanted.write(folder)
    found = Layout.read(folder)
    if (found.images, found.image_aspect_ratio) != (wanted.images, wanted.image_aspect_ratio):
        raise ConfigError(f"{folder} is a cache of other images; give another folder")
    if (found.store, found.shard_images) != (wanted.store, wanted.shard_images):
        raise ConfigError(
            f"{folder} was begun with --store {found.store} --shard-images {found.shard_images}; give the same, "
            f"or {AGAIN}"
        )
    return found


def _fill_shard(
    folder: Path,
    tower: ToveVisionModel,
    layout: Layout,
    shard: int,
    lacking: Sequence[str],
    decoded: Iterator[Opened],
    batch_size: int,
    progress: tqdm[None],
) -> None:
    count = len(layout.of(shard))
    experts = [name for name in lacking if name != CLIP]
    values: dict[str, list[np.ndarray]] = {name: [] for name in lacking}
    prints: list[Fingerprint] = []
    while len(prints) < count:
        batch = list(islice(decoded, min(batch_size, count - len(prints))))
        prints += [print_ for _, print_ in batch]
        pixels = torch.stack([pixels for pixels, _ in batch])  # [B,3,S,S]
        features = tower.frozen.encode(pixels.to(tower.device, tower.dtype), experts, strict=True)
        channels_first = {CLIP: features.base.transpose(1, 2), **features.experts}  # [B,d,N], [B,d_k,h_k,w_k]
        for name in lacking:
            values[name].append(channels_first[name].float().contiguous().cpu().numpy())
        progress.update(len(batch))
    if not prints_file(folder, shard).exists():
        write_json(prints_file(folder, shard), prints)  # first: a shard without fingerprints is made again
    for name, batches in values.items():
        write_shard(shard_file(folder, name, shard), np.concatenate(batches), layout.store)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[str], Opened], names: Iterable[str], count: int
) -> Iterator[Opened]:
    """Map in order, with at most ``count`` results waiting."""
    waiting: deque[Future[Opened]] = deque()
    for name in names:
        waiting.append(pool.submit(function, name))
        if len(waiting) == count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
