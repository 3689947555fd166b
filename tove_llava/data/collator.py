"""Make batches of padded rows, or of one packed row; expand images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data.dataset import Example
from tove_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass
class LlavaCollator:
    """Makes a batch of examples.

    Args:
        pad_token_id: fills rows on the right. Attention comes from the lengths, so any id will do.
        image_token_id: the language model's id of an image token.
        num_image_tokens: tokens of each image.
        multiple_of: round the width up to a multiple (8 or 64 for tensor cores).
        packed: one row of all sequences instead of padded rows.

    Returns (from a call):
        ``input_ids`` int64 [B, L], ``attention_mask`` int64 [B, L], ``labels`` int64 [B, L] with -100 on padding and
        images; ``supervised`` int64 [n], indices into the flattened batch of tokens whose next label is supervised;
        and, if there is any image, ``pixel_values`` float32 [all images of the batch, 3, S, S] in the order of their
        placeholders, or their ``vision_features``, or both, as the examples have them.

        Packed, B is 1 and L the sum of the lengths. The mask gives way to transformers' ``position_ids`` int64 [1, L],
        which restart with each sequence, ``cu_seq_lens_q`` and ``cu_seq_lens_k`` int32 [sequences + 1] (the start of
        each, and L), and the ints ``max_length_q`` and ``max_length_k``.
    """

    pad_token_id: int
    image_token_id: int
    num_image_tokens: int
    multiple_of: int | None = None
    packed: bool = False

    def __post_init__(self) -> None:
        if self.num_image_tokens < 1:
            raise ConfigError(f"num_image_tokens must be positive, not {self.num_image_tokens}")
        if self.multiple_of is not None and self.multiple_of < 1:
            raise ConfigError(f"multiple_of must be positive, not {self.multiple_of}")
        if self.packed and self.multiple_of is not None:
            raise ConfigError("multiple_of pads rows, and packed rows have no padding; give one of the two")

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        rows = [self._expand(example) for example in examples]
        batch = _one_row(rows) if self.packed else self._padded(rows)
        # Each token predicts the next; nothing predicts a sequence's first.
        follows = batch["labels"][:, 1:] != IGNORE_INDEX
        positions = torch.arange(batch["labels"].numel()).view_as(batch["labels"])
        batch["supervised"] = positions[:, :-1][follows]
        batch["image_positions"] = positions[batch["input_ids"] == self.image_token_id]
        pixels = [example["pixel_values"] for example in examples if example["pixel_values"] is not None]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)  # [sum of n_images, 3, S, S]
        features = [x for example in examples if (x := example.get("vision_features")) is not None]
        if features:
            batch["vision_features"] = type(features[0]).cat(features)
        return batch

    def _padded(self, rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
        width = max(len(ids) for ids, _ in rows)
        if self.multiple_of:
            width = -(-width // self.multiple_of) * self.multiple_of
        shape = (len(rows), width)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.long),
        }
        for row, (ids, labels) in enumerate(rows):
            batch["input_ids"][row, : len(ids)] = ids
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, : len(ids)] = labels
        return batch

    def _expand(self, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = example["input_ids"], example["labels"]
        is_image = ids == IMAGE_TOKEN_INDEX
        images = example["pixel_values"] if example["pixel_values"] is not None else example.get("vision_features")
        found, given = int(is_image.sum()), 0 if images is None else len(images)
        if found != given:
            raise DataError(f"an example has {found} image placeholders and {given} images; the two must be equal")
        if bool((ids[~is_image] == self.image_token_id).any()):
            raise DataError(f"an example's text contains the image token's id {self.image_token_id}")
        repeats = torch.where(is_image, self.num_image_tokens, 1)
        ids = torch.where(is_image, self.image_token_id, ids).repeat_interleave(repeats)
        return ids, torch.where(is_image, IGNORE_INDEX, labels).repeat_interleave(repeats)


def _one_row(rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    labels = torch.cat([labels for _, labels in rows])
    labels[bounds[:-1]] = IGNORE_INDEX  # else the last token of the previous sequence would have to predict it
    bounds, longest = bounds.to(torch.int32), int(lengths.max())
    return {
        "input_ids": torch.cat([ids for ids, _ in rows])[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
