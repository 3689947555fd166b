"""The training data set: checked when it is built, read lazily."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data.data_files import DataFiles
from tove_llava.data.images import ImageBytes, ImageTransform
from tove_llava.data.records import Record, find_image, prepare_turns
from tove_llava.data.templates import Template, get_template
from tove_llava.data.tokenization import IMAGE_TOKEN_INDEX, Encoded, encode_turns
from tove_llava.data.tokenizer import IMAGE_PLACEHOLDER, text_encoder

if TYPE_CHECKING:
    from tove_llava.tower import TowerFeatures

# Bytes, more than any template writes around a turn; only decides which records are examined closely.
_TEMPLATE_BYTES = 2000


class Example(TypedDict):
    """One record for the collator.

    ``pixel_values`` is float32 [images, 3, S, S], ``vision_features`` the output of the tower's frozen part. Each is
    None if it is not wanted or there are no images.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | None
    vision_features: TowerFeatures | None


class FeatureSource(Protocol):
    """A reader of features computed earlier, such as :class:`tove_llava.train.feature_cache.FeatureCache`."""

    def read(self, images: Sequence[str]) -> TowerFeatures:
        """Read the features of images, by their names in the records."""


@dataclass
class DataReport:
    """Records that are not trained on, by reason."""

    total: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)

    @property
    def counts(self) -> Counter[str]:
        """Count the records that each reason left out."""
        return Counter({reason: len(ids) for reason, ids in self.left_out.items()})

    def __str__(self) -> str:
        if not self.left_out:
            return f"all {self.total} records are trained on"
        lines = [f"{self.counts.total()} of {self.total} records are left out:"]
        for reason, ids in self.left_out.items():
            shown = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
            lines.append(f"  {len(ids)}: {reason} ({shown})")
        return "\n".join(lines)


class PreparedRecords(Sequence[Record]):
    """Records of data files with their turns prepared; each is read when it is asked for."""

    def __init__(self, files: DataFiles, kept: np.ndarray[Any, Any], template: Template) -> None:
        self.files, self.kept, self.template = files, kept, template

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        record = self.files[int(self.kept[index])]
        return replace(record, turns=tuple(prepare_turns(record, self.template)))


class LlavaDataset(Dataset[Example]):
    """LLaVA records as token ids, labels and pixels.

    All records are checked when the data set is built (DataError): structure, placeholders, that each image file exists
    inside the image folder, and that part of an answer survives ``model_max_length``. ``__getitem__`` decodes images.

    Args:
        data_path: data files and their weights, see :func:`tove_llava.data.data_paths.data_paths`.
        image_folder: folder that the records' file names are relative to.
        tokenizer: with a fast backend.
        template: conversation template, or its name.
        image_transform: makes the tower's input.
        num_image_tokens: tokens of an image in the language model's sequence.
        model_max_length: longest sequence, images expanded. An image that does not fit whole is left out with all that
            follows it.
        unsupervised: policy for records that lose every supervised token: ``"drop"`` counts them in :attr:`report`,
            ``"error"`` raises.
        check_files: look for each image file now rather than when it is needed.
        allow_image_links: see :func:`tove_llava.data.images.resolve_image`.
        features: read the images' features from here.
        read_pixels: decode the images; False where ``features`` suffice.
        image_placeholder: see :func:`tove_llava.data.records.place_images`.

    Attributes:
        records: the records that are trained on, their turns as :func:`prepare_turns` returns them. Each is read when
            it is asked for.
        modality_lengths: int32 [records], word counts, negative for text-only records: input of the grouped sampler.
        report: the records that are left out.
        sizes: number of records that are trained on, of each data file.
        weights: how often an epoch goes through them.
    """

    def __init__(
        self,
        data_path: str | Path,
        image_folder: str | Path | None,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | str,
        image_transform: ImageTransform,
        num_image_tokens: int,
        model_max_length: int = 2048,
        unsupervised: Literal["drop", "error"] = "drop",
        check_files: bool = True,
        allow_image_links: bool = False,
        features: FeatureSource | None = None,
        read_pixels: bool = True,
        image_placeholder: str = "written",
    ) -> None:
        if unsupervised not in ("drop", "error"):
            raise ConfigError(
                f"unknown policy {unsupervised!r} for records without supervised tokens; use drop or error"
            )
        self.image_folder = image_folder
        self.tokenizer = tokenizer
        self.template = get_template(template)
        self.image_transform = image_transform
        self.num_image_tokens = num_image_tokens
        self.model_max_length = model_max_length
        self.allow_image_links = allow_image_links
        self.features = features
        self.read_pixels = read_pixels
        self.report = DataReport()
        files = DataFiles(data_path, image_placeholder)
        self.report.total = len(files)
        kept, lengths = array("q"), array("i")
        for index, record in enumerate(files):
            prepared = replace(record, turns=tuple(prepare_turns(record, self.template)))
            reason = self._why_unsupervised(prepared)
            if reason is not None:
                if unsupervised == "error":
                    raise DataError(f"{record.where}: {reason}; lengthen model_max_length or take the record out")
                self.report.left_out.setdefault(reason, []).append(record.id or f"record {record.index}")
                continue
            if check_files:
                with record.errors():
                    for number in range(len(record.images)):
                        self._image_file(record, number)
            kept.append(index)
            lengths.append(record.modality_length or (1 if record.images else -1))
        self.records = PreparedRecords(files, np.array(kept), self.template)
        self.modality_lengths = np.array(lengths)
        self.sizes = np.diff(np.searchsorted(self.records.kept, files.starts)).tolist()
        self.weights = files.weights
        if not len(self.records):
            raise DataError(f"{data_path}: nothing is left to train on; {self.report}")
        self.encode(self.records[0])  # fails here if the tokenizer does not suit the template

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        encoded = self.encode(record)
        if not encoded.num_supervised:
            raise DataError(f"{record.where}: no supervised token is left; take the record out")
        num_images = encoded.num_images
        example: Example = {
            "input_ids": torch.tensor(encoded.input_ids, dtype=torch.long),
            "labels": torch.tensor(encoded.labels, dtype=torch.long),
            "pixel_values": None,
            "vision_features": None,
        }
        with record.errors():
            if num_images and self.read_pixels:
                files = [self._image_file(record, number) for number in range(num_images)]
                pixels = [self.image_transform.open(*file)[None] for file in files]  # [1,3,S,S] each
                example["pixel_values"] = pixels[0] if num_images == 1 else torch.cat(pixels)  # one needs no copy
            if num_images and self.features is not None:
                example["vision_features"] = self.features.read(record.file_names()[:num_images])
        return example

    def encode(self, record: Record) -> Encoded:
        """Encode one of :attr:`records`, cut to fit with its images expanded."""
        with record.errors():
            images = bool(record.images) or self.template.single_turn
            encoded = encode_turns(record.turns, self.tokenizer, self.template, images)
        return truncate(encoded, self.model_max_length, self.num_image_tokens)

    def _image_file(self, record: Record, number: int) -> tuple[Path | ImageBytes, str]:
        if self.image_folder is None and not record.contents:
            raise DataError(f"{record.where} has images; say where they are with --image_folder")
        return find_image(record, number, self.image_folder, self.allow_image_links)

    def _why_unsupervised(self, record: Record) -> str | None:
        """Return why no answer survives the cut; None if one does.

        A token covers at least one byte, so a text that is short in bytes fits without being tokenised.
        """
        if not any(turn.role == "assistant" and turn.text for turn in record.turns):
            return "no answer to learn from"
        budget = self.model_max_length - len(record.images) * self.num_image_tokens
        if sum(len((turn.text or "").encode()) for turn in record.turns) + _TEMPLATE_BYTES < budget:
            return None
        with record.errors():
            segments = self.template.render(record.turns, self.tokenizer)
        before = 0
        for segment in segments:
            if segment.supervised:
                break
            # each image, and the text after it, may cost a space marker
            before += len(segment.text.encode()) + segment.text.count(IMAGE_PLACEHOLDER)
        if before + len(text_encoder(self.tokenizer).prefix_ids) + 2 < budget:
            return None
        if self.encode(record).num_supervised:
            return None
        return f"the answers lie beyond model_max_length {self.model_max_length}"


def truncate(encoded: Encoded, max_length: int, num_image_tokens: int) -> Encoded:
    """Cut a sequence to ``max_length`` tokens, of which each image takes ``num_image_tokens``."""
    length = 0
    for index, token in enumerate(encoded.input_ids):
        length += num_image_tokens if token == IMAGE_TOKEN_INDEX else 1
        if length > max_length:
            return Encoded(encoded.input_ids[:index], encoded.labels[:index])
    return encoded
