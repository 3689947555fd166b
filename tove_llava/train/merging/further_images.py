"""Add images without text for the merge loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tove_llava.core.errors import DataError
from tove_llava.data import ImageTransform
from tove_llava.data.data_files import image_names
from tove_llava.data.dataset import FeatureSource
from tove_llava.data.images import resolve_image
from tove_llava.tower import TowerFeatures


@dataclass
class ImagePool:
    """The images that a file of records names.

    Raises:
        DataError: the file is not usable, or names no image.
    """

    data_path: Path
    folder: Path
    transform: ImageTransform
    features: FeatureSource | None = None  # if they were computed earlier
    allow_links: bool = False

    def __post_init__(self) -> None:
        self.names = list(dict.fromkeys(image_names(self.data_path)))
        if not self.names:
            raise DataError(f"{self.data_path} names no image to merge on; set merge_images_per_record to 0")

    def read(self, names: Sequence[str]) -> tuple[torch.Tensor, TowerFeatures | None]:
        """Return pixels ``[k,3,S,S]`` of named images, and features if available.

        Raises:
            DataError: a file is missing or damaged.
        """
        pixels = []
        for name in names:
            try:
                pixels.append(self.transform.open(resolve_image(self.folder, name, self.allow_links)))
            except DataError as error:
                raise DataError(f"{self.data_path}: image {name!r}: {error}") from error
        return torch.stack(pixels), None if self.features is None else self.features.read(names)


class FurtherImages:
    """Images dealt out evenly to a data set's records, ``per_record`` to each.

    A record's images follow from the seed and its index. Those of a global batch therefore do not depend on how it is
    split into micro-batches and ranks.
    """

    def __init__(self, pool: ImagePool, per_record: int, seed: int) -> None:
        self.pool = pool
        self.per_record = per_record
        order = torch.randperm(len(pool.names), generator=torch.Generator().manual_seed(seed)).tolist()
        self._names = [pool.names[index] for index in order]

    def of(self, index: int) -> tuple[torch.Tensor, TowerFeatures | None]:
        """Return pixels and features of the images of record ``index``."""
        first = index * self.per_record
        return self.pool.read([self._names[(first + k) % len(self._names)] for k in range(self.per_record)])
