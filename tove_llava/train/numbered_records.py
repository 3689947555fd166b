"""Give a batch the indices of its records, and the images that only the merge loss sees."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from tove_llava.core.errors import DataError, ToveError
from tove_llava.data import LlavaCollator, LlavaDataset
from tove_llava.data.packed_batch import PackedBatch
from tove_llava.tower import TowerFeatures
from tove_llava.train import interrupts
from tove_llava.train.merging import FurtherImages

FURTHER = "further_images"  # batch key: number of images that only the merge loss sees
RECORD = "record_index"  # batch key: indices of a micro-batch's records, for error messages


@contextmanager
def worker_errors() -> Iterator[None]:
    """Raise an error of a data worker as it was raised there, without the loader's traceback."""
    try:
        yield
    except ToveError as error:
        kind = type(error)
        before, _, message = str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")
        if not before.startswith(f"Caught {kind.__name__} in "):
            raise
        raise kind(message.rstrip()) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise DataError(
            f"a process that reads images has ended ({error}); memory may be full: lower --dataloader_num_workers"
        ) from error


class Numbered(Dataset[Any]):
    """Examples with the index of their record and their further images."""

    def __init__(self, dataset: LlavaDataset, further: FurtherImages | None) -> None:
        self.dataset = dataset
        self.further = further

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None:
            interrupts.leave_to_parent()  # a signal for the process group must not end the workers before the run
        return index, self.dataset[index], None if self.further is None else self.further.of(index)


class NumberedCollator:
    def __init__(self, collator: LlavaCollator) -> None:
        self.collator = collator

    def __call__(self, numbered: list[Any]) -> dict[str, Any] | PackedBatch:
        batch = self._collate(numbered)
        return batch if get_worker_info() is None else PackedBatch(batch)  # it arrives as the batch

    def _collate(self, numbered: list[Any]) -> dict[str, Any]:
        indices, examples, further = zip(*numbered, strict=True)
        batch = {**self.collator(examples), RECORD: torch.tensor(indices)}
        more = [entry for entry in further if entry is not None]
        if more:  # after the images that have placeholders
            pixels = [pixels for pixels, _ in more]
            features = [features for _, features in more if features is not None]
            batch[FURTHER] = sum(map(len, pixels))
            if batch.get("pixel_values") is not None:
                pixels.insert(0, batch["pixel_values"])
            batch["pixel_values"] = torch.cat(pixels)
            if features:
                if batch.get("vision_features") is not None:
                    features.insert(0, batch["vision_features"])
                batch["vision_features"] = TowerFeatures.cat(features)
        return batch
