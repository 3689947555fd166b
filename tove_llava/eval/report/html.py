"""Blocks as one HTML file that needs no other file, no script and no network."""

import base64
from collections.abc import Sequence
from html import escape

from tove_llava.eval.report.document import Block, Bullets, Cell, Fold, Heading, Picture, Table, Text

# The policy lets a browser load nothing but the pictures inside the page, should an escape ever be missing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; display: block; overflow-x: auto; }
th, td { border: 1px solid #8885; padding: .25rem .6rem; text-align: right; vertical-align: top; }
th.text, td.text { text-align: left; overflow-wrap: break-word; max-width: 26rem; white-space: pre-line; }
td { font-variant-numeric: tabular-nums; }
thead th { background: #8882; }
summary { cursor: pointer; margin: .5rem 0; }
img { display: block; }
"""


def render(blocks: Sequence[Block], title: str) -> str:
    """The page's text."""
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{_STYLE}</style>'
    )
    body = "\n".join(_block(block) for block in blocks)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Bullets):
        return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in block.items)}</ul>"
    if isinstance(block, Fold):
        inner = "\n".join(_block(part) for part in block.blocks)
        return f"<details><summary>{escape(block.title)}</summary>\n{inner}\n</details>"
    return _table(block)


def _table(table: Table) -> str:
    header = _row(table.header, table.left, "th")
    rows = "\n".join(_row(row, table.left, "td") for row in table.rows)
    return f"<table><thead>{header}</thead>\n<tbody>\n{rows}\n</tbody></table>"


def _row(cells: Sequence[Cell], left: int, tag: str) -> str:
    kinds = [' class="text"' if column < left else "" for column in range(len(cells))]
    return f"<tr>{''.join(f'<{tag}{k}>{_cell(c)}</{tag}>' for k, c in zip(kinds, cells, strict=True))}</tr>"


def _cell(cell: Cell) -> str:
    if isinstance(cell, Picture):
        data = base64.b64encode(cell.jpeg).decode()
        return f'<img alt="{escape(cell.alt)}" src="data:image/jpeg;base64,{data}">'
    return escape(cell)
