"""Colours of the routing's columns, the same in the page and in the figures."""

import numpy as np

#: RGB by gate column; an eleventh column has the first colour
COLUMN_COLOURS: tuple[tuple[int, int, int], ...] = (
    (59, 130, 246),
    (245, 158, 11),
    (16, 185, 129),
    (236, 72, 153),
    (139, 92, 246),
    (6, 182, 212),
    (132, 204, 22),
    (239, 68, 68),
    (168, 128, 90),
    (148, 163, 184),
)

# Viridis, sampled at ten places.
_HEAT = np.array(
    [
        (68, 1, 84),
        (72, 40, 120),
        (62, 73, 137),
        (49, 104, 142),
        (38, 130, 142),
        (31, 158, 137),
        (53, 183, 121),
        (110, 206, 88),
        (181, 222, 43),
        (253, 231, 37),
    ],
    dtype=np.float64,
)


def column_colour(index: int) -> tuple[int, int, int]:
    """Return the RGB of a column."""
    return COLUMN_COLOURS[index % len(COLUMN_COLOURS)]


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Map values in 0..1 of any shape to Viridis, as uint8 with a last axis of 3; other values are clipped."""
    points = np.linspace(0.0, 1.0, len(_HEAT))
    channels = [np.interp(values, points, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
