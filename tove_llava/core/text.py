"""Tables, lists, numbers and other values as text."""

from collections.abc import Iterable, Sequence
from typing import Any

GIB = 2**30


def aligned(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format rows of cells, the heading first, for the terminal.

    Args:
        left: leading columns that stand on the left; the others stand on the right.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("  ".join(_padded(line, widths, left)).rstrip() for line in ruled)


def _padded(line: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    cells = list(zip(line, widths, strict=True))
    return [cell.ljust(width) for cell, width in cells[:left]] + [cell.rjust(width) for cell, width in cells[left:]]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Format a Markdown table, with ``left`` as in :func:`aligned`."""
    marks = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, marks, *rows))


def listed(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Format names and their values as indented, aligned lines."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def number(value: float | None, form: str) -> str:
    """Format a number for a table; None is a dash."""
    return "-" if value is None else format(value, form)


def percent(value: float | None, form: str) -> str:
    """Format a share as a percentage; None is a dash."""
    return number(None if value is None else 100 * value, form)


def has_encoding(value: str) -> bool:
    """Return False for text with half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(value: Any) -> Any:
    """Escape halves of surrogate pairs in a text; other values stay."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def short(value: Any) -> str:
    """Write a value for a message, in at most 60 characters."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"
    return text if len(text) <= 60 else text[:57] + "..."
