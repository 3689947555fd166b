"""The legend below the routing: each expert's colour and share. HTML, with every name escaped."""

import html
from collections.abc import Sequence

from tove_llava.analysis.colours import column_colour, heat_colours
from tove_llava.serve.ui.overlay import ALL, Look

NO_PICTURE = "Add a picture, and its map appears here: which expert each part of it listens to."
NO_GATE = "No map: without experts (or a gate) the picture is read by CLIP alone."


def legend(found: Look | None, experts: Sequence[str], view: str = ALL) -> str:
    """Rows of name, bar and share. The share is an expert's mean gate weight over the picture's tokens."""
    if found is None:
        return f'<p class="tove-hint">{NO_PICTURE}</p>'
    if found.routing is None:
        return f'<p class="tove-hint">{NO_GATE}</p>'
    means = found.routing.means
    rows = [
        _row(name, index, means[name], name in found.attached or name not in experts)
        for index, name in enumerate(found.routing.grids)
    ]
    return f'<div class="tove-legend">{"".join(rows)}</div>{_scale(found, view)}'


def _row(name: str, index: int, share: float, attached: bool) -> str:
    colour = "#{:02x}{:02x}{:02x}".format(*column_colour(index))
    value = f"{100 * share:.0f} %" if attached else "detached"
    state = "" if attached else " tove-off"
    return (
        f'<div class="tove-row{state}"><i style="background:{colour}"></i><span>{html.escape(name)}</span>'
        f'<b><u style="width:{100 * share:.1f}%;background:{colour}"></u></b><em>{value}</em></div>'
    )


def _scale(found: Look, view: str) -> str:
    """What the colours mean."""
    if found.routing is None or view == ALL or view not in found.routing.grids:
        return '<p class="tove-hint">Colours: the expert with the largest weight. Bars: mean weight.</p>'
    largest = max(max(map(max, grid)) for grid in found.routing.grids.values())
    stops = ",".join("#{:02x}{:02x}{:02x}".format(*heat_colours(place / 8)) for place in range(9))  # type: ignore[arg-type]
    return (
        f'<p class="tove-hint tove-scale">weight of {html.escape(view)}: 0 '
        f'<i style="background:linear-gradient(90deg,{stops})"></i> {largest:.2f}</p>'
    )
