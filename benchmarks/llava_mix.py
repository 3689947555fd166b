"""Records like LLaVA-1.5's instruction mix, with photographs of COCO's size.

Shares are those of ``llava_v1_5_mix665k.json`` (https://github.com/haotian-liu/LLaVA, README). How many turns a record
has and how many words a turn is our estimate, and is printed with every result.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

Range = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """One source of the mix. Ranges include both ends."""

    name: str
    thousands: int
    turns: Range
    question: Range  # words
    answer: Range
    picture: bool = True


MIX = (
    Part("LLaVA instructions", 158, (1, 5), (6, 16), (30, 110)),
    Part("ShareGPT", 40, (2, 8), (10, 60), (80, 220), picture=False),
    Part("VQAv2", 83, (3, 8), (4, 9), (1, 1)),
    Part("GQA", 72, (5, 15), (6, 12), (1, 1)),
    Part("OKVQA", 9, (1, 2), (6, 10), (1, 2)),
    Part("OCR-VQA", 80, (4, 6), (6, 10), (2, 8)),
    Part("A-OKVQA", 66, (1, 1), (25, 45), (1, 1)),
    Part("TextCaps", 22, (1, 1), (25, 35), (9, 16)),
    Part("RefCOCO", 48, (2, 8), (12, 20), (4, 12)),
    Part("Visual Genome", 86, (5, 15), (12, 20), (4, 10)),
)

# Several lengths; some words are several tokens of LLaMA's.
WORDS = (
    "the", "a", "of", "in", "and", "to", "is", "it", "that", "on", "with", "for", "red", "small", "woman", "standing",
    "beside", "photograph", "restaurant", "bicycle", "intersection", "approximately", "sunglasses", "kitchen",
    "counter", "umbrella", "42", "left", "right", "question", "answer", "because", "mountain", "straightforward",
    "player", "holding", "a.m.", "[0.25,", "0.74]", "motorcycle", "vegetables",
)  # fmt: skip


def write_mix(root: Path, count: int, *, size: Range = (640, 480), pictures: int = 64, seed: int = 0) -> Path:
    """Write ``records.json`` and ``images/``; return the file.

    Args:
        count: records.
        size: width and height of the photographs.
        pictures: the number of different photographs.
    """
    draw = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    for index in range(pictures):
        photograph(draw, size).save(root / "images" / f"{index}.jpg", quality=92)
    shares = np.array([part.thousands for part in MIX], dtype=float)
    records = []
    for index, choice in enumerate(draw.choice(len(MIX), size=count, p=shares / shares.sum())):
        record = {"id": f"{MIX[choice].name}-{index}", "conversations": conversation(draw, MIX[choice])}
        if MIX[choice].picture:
            record["image"] = f"{index % pictures}.jpg"
        records.append(record)
    file = root / "records.json"
    file.write_text(json.dumps(records))
    return file


def conversation(draw: np.random.Generator, part: Part) -> list[dict[str, str]]:
    """Make one record's turns, in LLaVA's format."""
    turns = []
    for turn in range(_in(draw, part.turns)):
        head = "<image>\n" if part.picture and turn == 0 else ""
        turns.append({"from": "human", "value": head + _text(draw, part.question) + "?"})
        turns.append({"from": "gpt", "value": _text(draw, part.answer)})
    return turns


def photograph(draw: np.random.Generator, size: Range) -> Image.Image:
    """Make an image with detail at every scale, as photographs have.

    At quality 92 its JPEG has 150 kB, as COCO's have on average (train2017: 18 GB, 118,000 files).
    """
    width, height = size
    total = np.zeros((height, width, 3))
    for octave in range(2, 9):
        grid = draw.integers(0, 256, (max(height >> (9 - octave), 2), max(width >> (9 - octave), 2), 3), dtype=np.uint8)
        layer = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)
        total += (np.asarray(layer, dtype=float) - 128) / 1.7 ** (octave - 2)
    grain = draw.normal(0, 12, (height, width, 1))
    return Image.fromarray((total * 0.6 + grain + 128).clip(0, 255).astype(np.uint8))


def describe() -> str:
    """Describe the mix in one line."""
    return "; ".join(f"{p.thousands} {p.name} {_range(p.turns)} turns" for p in MIX)


def _range(ends: Sequence[int]) -> str:
    return f"{ends[0]}-{ends[1]}"


def _in(draw: np.random.Generator, ends: Range) -> int:
    return int(draw.integers(ends[0], ends[1] + 1))


def _text(draw: np.random.Generator, words: Range) -> str:
    return " ".join(draw.choice(WORDS, size=_in(draw, words)))
