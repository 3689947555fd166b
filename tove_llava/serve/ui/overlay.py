"""The routing over the image that the model sees, and its legend."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tove_llava.analysis.colours import column_colour, heat_colours
from tove_llava.inference.engine import Engine, RoutingMap
from tove_llava.serve.ui.session import Session

ALL = "all experts"  # the view of the largest weight; any other is an expert's name
NO_IMAGE = "Add an image, and its map appears here: which expert each part of it listens to."
NO_GATE = "No map: without experts (or a gate) only CLIP reads the image."


@dataclass(frozen=True)
class RoutingView:
    """One image and its routing (None without a gate or attached experts)."""

    framed: Image.Image
    routing: RoutingMap | None
    attached: tuple[str, ...]


def view_routing(session: Session, engine: Engine, file: str, experts: Sequence[str] | None) -> RoutingView:
    """Run the tower on one image.

    Raises:
        ToveError: as of ``Engine.routing`` and ``Session.see``.
    """
    seen = session.see(engine, file)
    attached = engine.experts if experts is None else tuple(experts)
    return RoutingView(seen.framed, engine.routing(seen.pixels, attached), attached)


def draw(view: RoutingView, choice: str = ALL, opacity: float = 0.55) -> Image.Image:
    """Draw the routing over its image.

    Args:
        choice: :data:`ALL` colours each token as the expert with the largest weight; an expert's name shows that
            expert's weight, from 0 to the largest of all.
        opacity: 0 shows only the image, 1 only the map.
    """
    routing = view.routing
    if routing is None or (choice != ALL and choice not in routing.names):
        return view.framed
    if choice == ALL:
        colours = np.array([column_colour(index) for index in range(len(routing.names))], dtype=np.uint8)
        cells = colours[routing.argmax.numpy()]
    else:
        weights = routing.weights.numpy()
        cells = heat_colours(weights[..., routing.names.index(choice)] / (weights.max() or 1.0))
    layer = Image.fromarray(cells).resize(view.framed.size, Image.Resampling.NEAREST)
    return Image.blend(view.framed, layer, min(max(opacity, 0.0), 1.0))


def legend(view: RoutingView | None, experts: Sequence[str], choice: str = ALL) -> str:
    """List each expert's name, bar and mean gate weight over the tokens."""
    if view is None:
        return f'<p class="tove-hint">{NO_IMAGE}</p>'
    if view.routing is None:
        return f'<p class="tove-hint">{NO_GATE}</p>'
    rows = ""
    for index, (name, share) in enumerate(view.routing.means.items()):
        colour = "#{:02x}{:02x}{:02x}".format(*column_colour(index))
        attached = name in view.attached or name not in experts
        value, state = (f"{100 * share:.0f} %", "") if attached else ("detached", " tove-off")
        rows += (
            f'<div class="tove-row{state}"><i style="background:{colour}"></i><span>{html.escape(name)}</span>'
            f'<b><u style="width:{100 * share:.1f}%;background:{colour}"></u></b><em>{value}</em></div>'
        )
    hint = '<p class="tove-hint">Colours: the expert with the largest weight. Bars: mean weight.</p>'
    if choice != ALL and choice in view.routing.names:
        largest = view.routing.weights.max().item()
        stops = ",".join("#{:02x}{:02x}{:02x}".format(*heat_colours(step / 8)) for step in range(9))  # type: ignore[arg-type]
        hint = (
            f'<p class="tove-hint tove-scale">weight of {html.escape(choice)}: 0 '
            f'<i style="background:linear-gradient(90deg,{stops})"></i> {largest:.2f}</p>'
        )
    return f'<div class="tove-legend">{rows}</div>{hint}'


def name_of(model: str) -> str:
    """Shorten a model's folder; a vague name keeps the folder above it."""
    path = Path(model)
    return "/".join(path.parts[-2:]) if path.name in ("model", "merged", "export") else path.name or "model"
