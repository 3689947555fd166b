"""Blocks as GitHub-flavoured Markdown; pictures are files in a folder beside the page."""

import re
from collections.abc import Sequence

from tove_llava.eval.report.document import Block, Bullets, Cell, Fold, Heading, Picture, Table, Text

PICTURES = "pictures"  # the folder

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$!&])")


def render(blocks: Sequence[Block]) -> str:
    """The page's text."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {escape(block.text)}"
    if isinstance(block, Text):
        return escape(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"* {escape(item)}" for item in block.items)
    if isinstance(block, Fold):
        # The HTML that GitHub folds; the empty lines let it read Markdown inside.
        inner = "\n\n".join(_block(part) for part in block.blocks)
        return f"<details><summary>{_html(block.title)}</summary>\n\n{inner}\n\n</details>"
    return _table(block)


def _table(table: Table) -> str:
    marks = [":---" if column < table.left else "---:" for column in range(len(table.header))]
    lines = [[escape(cell) for cell in table.header], marks, *([_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Picture):
        return f"![{escape(cell.alt)}]({PICTURES}/{cell.name})"
    return escape(cell)


def escape(text: str) -> str:
    """Text that shows as it is, on one line: no markup, link or HTML comes of it."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _html(text: str) -> str:
    from html import escape as html_escape

    return html_escape(" ".join(text.split()))
