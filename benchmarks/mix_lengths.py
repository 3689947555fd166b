"""The lengths of LLaVA-1.5's mix (llava_mix.py), which need no tokenizer.

``mix_lengths.json`` has one record for each thousand of the mix, by its part: words, tokens of text and supervised
tokens, under the template v1. The tokenizer was LLaMA's, which is Vicuna's. Written by

    python benchmarks/mix_lengths.py --tokenizer vicuna/tokenizer.model --name "LLaMA, 32,000 pieces"
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import run_command
from llava_mix import MIX, conversation
from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import ConfigError
from tove_llava.data import IGNORE_INDEX, IMAGE_TOKEN_INDEX, ImageTransform, LlavaDataset, load_tokenizer

FILE = Path(__file__).with_suffix(".json")
WHOLE = 10**6  # longer than any record


@dataclass(frozen=True)
class Length:
    """The full length of a record; tokens do not count the image's."""

    words: int
    tokens: int
    supervised: int
    picture: bool

    @property
    def modality(self) -> int:
        """Return the length by which LLaVA's sampler groups."""
        return self.words if self.picture else -self.words

    def example(self, vocabulary: int, pixels: torch.Tensor, text: int) -> dict[str, Any]:
        """Make a meaningless record of this length, supervised tokens spread evenly.

        Args:
            pixels: its image, ``[1,3,S,S]``.
            text: tokens of text to which it is cut.
        """
        text = min(self.tokens, text)
        ids = torch.arange(text) % vocabulary
        due = torch.arange(text + 1) * self.supervised // self.tokens
        labels = torch.where(due[1:] > due[:-1], ids, IGNORE_INDEX)
        if self.picture:
            placeholder = torch.tensor([IMAGE_TOKEN_INDEX])
            ids = torch.cat([ids[:1], placeholder, ids[1:]])
            labels = torch.cat([labels[:1], torch.tensor([IGNORE_INDEX]), labels[1:]])
        given = pixels if self.picture else None
        return {"input_ids": ids, "labels": labels, "pixel_values": given, "vision_features": None}


class DrawnMix:
    """Examples of given lengths, in the form of the training data set.

    Args:
        vocabulary: words of the model; ids are below.
        image_size, image_tokens: of an image.
        longest: tokens, an image's included, to which records are cut.
    """

    def __init__(
        self, lengths: Sequence[Length], vocabulary: int, image_size: int, image_tokens: int, longest: int
    ) -> None:
        self.lengths, self.vocabulary = lengths, vocabulary
        self.image_tokens, self.longest = image_tokens, longest
        self.pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))

    @property
    def modality_lengths(self) -> list[int]:
        return [length.modality for length in self.lengths]

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = self.lengths[index]
        text = self.longest - (self.image_tokens if length.picture else 0)
        return length.example(self.vocabulary, self.pixels, text)


@dataclass(frozen=True)
class MixLengths:
    """The table, and what it was drawn with."""

    tokenizer: str
    seed: int
    records: list[Length]

    def draw(self, count: int, seed: int) -> list[Length]:
        """Draw ``count`` records in random order; all come before any repeats."""
        draw = np.random.default_rng(seed)
        rounds = [draw.permutation(len(self.records)) for _ in range(-(-count // len(self.records)))]
        return [self.records[index] for index in np.concatenate(rounds)[:count]]


def read_lengths(file: Path = FILE) -> MixLengths:
    """Read the committed table."""
    table = json.loads(file.read_text())
    records = [
        Length(*row, picture=part.picture) for part in MIX for row in zip(*table["parts"][part.name], strict=True)
    ]
    return MixLengths(table["tokenizer"], table["seed"], records)


def draw_lengths(tokenizer: PreTrainedTokenizerBase, seed: int, share: float = 1.0) -> dict[str, list[list[int]]]:
    """Draw ``share`` of the table: words, tokens and supervised tokens by part."""
    draw, parts = np.random.default_rng(seed), {}
    for part in MIX:
        count = max(1, round(part.thousands * share))
        records = [{"id": str(i), "conversations": conversation(draw, part)} for i in range(count)]
        for record in records if part.picture else []:
            record["image"] = "0.jpg"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "records.json"
            file.write_text(json.dumps(records))
            dataset = LlavaDataset(
                file, folder, tokenizer, "v1", ImageTransform(32, "pad"), 1, WHOLE, check_files=False, read_pixels=False
            )
            rows = [dataset.encode(record) for record in dataset.records]
        words = [abs(length) for length in dataset.modality_lengths]
        tokens = [len(row.input_ids) - row.num_images for row in rows]
        parts[part.name] = [words, tokens, [row.num_supervised for row in rows]]
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder, file or source")
    parser.add_argument("--name", required=True, help="of the tokenizer, for results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FILE, metavar="FILE", help="default: the committed table")
    args = parser.parse_args(argv)

    def write() -> None:
        if not args.name.strip():
            raise ConfigError("--name must say which tokenizer it is")
        parts = draw_lengths(load_tokenizer(args.tokenizer), args.seed)
        head = {"tokenizer": args.name, "seed": args.seed, "columns": ["words", "tokens", "supervised"]}
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(columns)}" for name, columns in parts.items())
        args.output.write_text(json.dumps(head)[:-1] + ', "parts": {\n' + rows + "\n}}\n")

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
