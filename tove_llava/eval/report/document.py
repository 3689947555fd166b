"""A page as a list of blocks, which :mod:`markdown` and :mod:`html` render. All texts are plain: renderers escape."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Heading:
    level: int  # 1 to 3
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """A JPEG.

    Attributes:
        name: file name without folder, for pages that refer to files.
        alt: what stands for it in text.
    """

    jpeg: bytes = field(repr=False)
    name: str
    alt: str


Cell = str | Picture


@dataclass(frozen=True)
class Table:
    """A heading and rows of as many cells; the first ``left`` columns are text, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: int = 1


@dataclass(frozen=True)
class Fold:
    """Blocks that are closed at first where the format has that."""

    title: str
    blocks: Sequence["Block"]


Block = Heading | Text | Bullets | Table | Fold


def pictures(blocks: Sequence[Block]) -> Iterator[Picture]:
    """All pictures of a page."""
    for block in blocks:
        if isinstance(block, Table):
            yield from (cell for row in block.rows for cell in row if isinstance(cell, Picture))
        elif isinstance(block, Fold):
            yield from pictures(block.blocks)
