"""The training data set: checked when it is built, read lazily."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data.images import ImageTransform, resolve_image
from tove_llava.data.records import Record, load_records, prepare_turns
from tove_llava.data.templates import Template, get_template
from tove_llava.data.tokenization import IMAGE_TOKEN_INDEX, Encoded, encode_record
from tove_llava.data.tokenizer import IMAGE_PLACEHOLDER, text_encoder

if TYPE_CHECKING:
    from tove_llava.tower import TowerFeatures

# More than any template writes around one turn, in bytes; only decides which records are looked at closely.
_TEMPLATE_BYTES = 2000


class Example(TypedDict):
    """What the collator takes.

    ``pixel_values`` is float32 [images, 3, S, S], ``vision_features`` what the tower's frozen part gives for the
    images; either is None where it is not wanted or there are no images.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | None
    vision_features: TowerFeatures | None


class FeatureSource(Protocol):
    """Where features computed earlier are read (:class:`tove_llava.train.features.FeatureCache`)."""

    def read(self, images: Sequence[str]) -> TowerFeatures:
        """Features of images, by the names that records call them."""


@dataclass
class DataReport:
    """Records that are not trained on, and why."""

    total: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, record: Record) -> None:
        self.left_out.setdefault(reason, []).append(record.id or f"record {record.index}")

    @property
    def counts(self) -> Counter[str]:
        """How many records each reason left out."""
        return Counter({reason: len(ids) for reason, ids in self.left_out.items()})

    def __str__(self) -> str:
        if not self.left_out:
            return f"all {self.total} records are trained on"
        lines = [f"{self.counts.total()} of {self.total} records are left out:"]
        for reason, ids in self.left_out.items():
            shown = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
            lines.append(f"  {len(ids)}: {reason} ({shown})")
        return "\n".join(lines)


class LlavaDataset(Dataset[Example]):
    """LLaVA records as token ids, labels and pixels.

    All records are checked when the data set is built: structure, placeholders, that each image file exists inside the
    image folder, and that something of each answer survives ``model_max_length``. Pictures are decoded in
    ``__getitem__``.

    Args:
        data_path: a JSON or JSONL file.
        image_folder: where the records' file names start.
        tokenizer: with a fast backend.
        template: conversation template, or its name.
        image_transform: makes the tower's input.
        num_image_tokens: positions that an image takes in the language model's sequence.
        model_max_length: longest sequence, images expanded. A cut never goes through an image: one that does
            not fit whole is left out with what follows it.
        unsupervised: what becomes of records of which no supervised token is left: ``"drop"`` leaves them out and
            counts them in :attr:`report`, ``"error"`` raises.
        check_files: look for each image file now rather than when it is needed.
        allow_image_links: see :func:`tove_llava.data.images.resolve_image`.
        features: read the images' features from here.
        read_pixels: decode the pictures; False where ``features`` are all that is needed.

    Raises:
        DataError: a record, or an image path, cannot be used.
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
    ) -> None:
        if unsupervised not in ("drop", "error"):
            raise ConfigError(
                f"unknown policy {unsupervised!r} for records without supervised tokens; use drop or error"
            )
        self.image_folder = image_folder
        self.tokenizer = tokenizer
        self.template = get_template(template) if isinstance(template, str) else template
        self.image_transform = image_transform
        self.num_image_tokens = num_image_tokens
        self.model_max_length = model_max_length
        self.allow_image_links = allow_image_links
        self.features = features
        self.read_pixels = read_pixels
        self.report = DataReport()
        self.records: list[Record] = []
        for record in load_records(data_path):
            self.report.total += 1
            reason = self._why_unsupervised(record)
            if reason is not None:
                if unsupervised == "error":
                    raise DataError(f"{record.where}: {reason}; lengthen model_max_length or take the record out")
                self.report.add(reason, record)
                continue
            if check_files:
                self._image_files(record)
            self.records.append(record)
        if not self.records:
            raise DataError(f"{data_path}: nothing is left to train on; {self.report}")
        self.encode(self.records[0])  # a tokenizer that does not suit the template shows now

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        encoded = self.encode(record)
        if not encoded.num_supervised:
            raise DataError(f"{record.where}: no supervised token is left; take the record out")
        example: Example = {
            "input_ids": torch.tensor(encoded.input_ids, dtype=torch.long),
            "labels": torch.tensor(encoded.labels, dtype=torch.long),
            "pixel_values": None,
            "vision_features": None,
        }
        if encoded.num_images and self.read_pixels:
            files = self._image_files(record)[: encoded.num_images]
            with record.errors():
                pixels = [self.image_transform.open(file)[None] for file in files]  # [1,3,S,S] each
            example["pixel_values"] = pixels[0] if len(pixels) == 1 else torch.cat(pixels)  # one needs no copy
        if encoded.num_images and self.features is not None:
            with record.errors():
                example["vision_features"] = self.features.read(record.images[: encoded.num_images])
        return example

    def encode(self, record: Record) -> Encoded:
        """Ids and labels, cut so that they fit with the images expanded."""
        encoded = encode_record(record, self.tokenizer, self.template)
        return truncate(encoded, self.model_max_length, self.num_image_tokens)

    @property
    def modality_lengths(self) -> list[int]:
        """Word counts, negative for text-only records: input of the grouped sampler."""
        return [record.modality_length or (1 if record.images else -1) for record in self.records]

    def _image_files(self, record: Record) -> list[Path]:
        if record.images and self.image_folder is None:
            raise DataError(f"{record.where} has images; say where they are with --image_folder")
        with record.errors():
            return [resolve_image(self.image_folder or "", name, self.allow_image_links) for name in record.images]

    def _why_unsupervised(self, record: Record) -> str | None:
        """None if something of an answer is certainly left after the cut; else the reason.

        A token covers at least one byte, so text that is short in bytes need not be tokenised to know that it fits.
        """
        turns = prepare_turns(record, self.template)
        if not any(turn.role == "assistant" and turn.text for turn in turns):
            return "no answer to learn from"
        budget = self.model_max_length - len(record.images) * self.num_image_tokens
        if sum(len((turn.text or "").encode()) for turn in turns) + _TEMPLATE_BYTES < budget:
            return None
        with record.errors():
            segments = self.template.render(turns, self.tokenizer)
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
    """Cut a sequence so that it is at most ``max_length`` long once each image takes ``num_image_tokens`` positions."""
    length = 0
    for position, token in enumerate(encoded.input_ids):
        length += num_image_tokens if token == IMAGE_TOKEN_INDEX else 1
        if length > max_length:
            return Encoded(encoded.input_ids[:position], encoded.labels[:position])
    return encoded
