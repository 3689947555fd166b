"""Colours of gate columns, the same on the page and in figures."""

import numpy as np


def _rgb(text: str) -> list[tuple[int, int, int]]:
    return [tuple(bytes.fromhex(colour)) for colour in text.split()]  # type: ignore[misc]


#: RGB by gate column; an eleventh column has the first colour
COLUMN_COLOURS = _rgb("3b82f6 f59e0b 10b981 ec4899 8b5cf6 06b6d4 84cc16 ef4444 a8805a 94a3b8")
# Viridis at ten points.
_HEAT = np.array(_rgb("440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"), dtype=np.float64)


def column_colour(index: int) -> tuple[int, int, int]:
    """Return the RGB of a column."""
    return COLUMN_COLOURS[index % len(COLUMN_COLOURS)]


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Map values, clipped to 0..1, to Viridis: uint8 ``[..., 3]``."""
    points = np.linspace(0.0, 1.0, len(_HEAT))
    channels = [np.interp(values, points, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
