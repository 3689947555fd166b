"""Further images for the merge loss, which needs no text: an encoder learns from many pictures, and text costs."""

from __future__ import annotations

from typing import Any

import torch

from tove_llava.data import LlavaDataset
from tove_llava.errors import ConfigError, DataError
from tove_llava.tower import TowerFeatures


class FurtherImages:
    """Deals a data set's images out to its records, ``per_record`` to each, evenly.

    Which images a record brings follows from the seed and the record alone, so the images of a global batch do not
    depend on how it was split into micro-batches and ranks.

    Raises:
        ConfigError: a negative number. DataError: the data set has no images.
    """

    def __init__(self, dataset: LlavaDataset, per_record: int, seed: int) -> None:
        if per_record < 0:
            raise ConfigError(f"merge_images_per_record={per_record} must not be negative")
        self.dataset = dataset
        self.per_record = per_record
        owners: dict[str, Any] = {}
        for record in dataset.records:
            owners |= {name: record for name in record.images if name not in owners}
        if per_record and not owners:
            raise DataError("the data set has no images to merge on; set merge_images_per_record to 0")
        names = list(owners)
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        self._names = [names[place] for place in order]
        self._owners = owners

    def of(self, index: int) -> tuple[torch.Tensor, TowerFeatures | None] | None:
        """``[k,3,S,S]`` pixels of the images that record ``index`` brings, and their features where there is a cache."""
        if not self.per_record:
            return None
        first = index * self.per_record
        names = [self._names[(first + k) % len(self._names)] for k in range(self.per_record)]
        pixels = [self.dataset.open_image(self._owners[name], name) for name in names]
        features = None if self.dataset.features is None else self.dataset.features.read(names)
        return torch.stack(pixels), features
