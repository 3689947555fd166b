"""The routing drawn over the picture that the model sees. Nothing here runs the model but :func:`look`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tove_llava.analysis.colours import column_colour, heat_colours
from tove_llava.inference.engine import Engine, Routing
from tove_llava.serve.ui.conversation import picture

ALL = "all experts"  # the view of the largest weight; any other is an expert's name
SIDE = 480  # pixels of the drawing's side


@dataclass(frozen=True)
class Look:
    """One picture and its routing; ``routing`` is None without a gate or with all experts detached."""

    seen: Image.Image  # RGB, SIDE x SIDE
    routing: Routing | None
    attached: tuple[str, ...]


def look(engine: Engine, file: str, experts: Sequence[str] | None = None) -> Look:
    """Runs the tower on one picture.

    Raises:
        ToveError: as of ``Engine.routing`` and ``conversation.picture``.
    """
    opened = picture(file)
    routing = engine.routing(opened, experts)
    seen = engine.answerer.upright_transform.framed(opened).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return Look(seen, routing, engine.experts if experts is None else tuple(experts))


def views(experts: Sequence[str]) -> list[str]:
    """What :func:`draw` can show: the argmax map, and one heat map for each expert."""
    return [ALL, *experts]


def draw(found: Look, view: str = ALL, opacity: float = 0.55) -> Image.Image:
    """The picture under its routing: :data:`ALL` colours each token as the expert that it listens to most, an
    expert's name shows that expert's weight from 0 to the largest of all.

    Args:
        opacity: 0 shows the picture alone, 1 the map alone.
    """
    routing = found.routing
    if routing is None or (view != ALL and view not in routing.grids):
        return found.seen
    if view == ALL:
        names = list(routing.grids)
        colours = np.array([column_colour(index) for index in range(len(names))], dtype=np.uint8)
        cells = colours[np.array([[names.index(name) for name in row] for row in routing.argmax])]
    else:
        largest = max(max(map(max, grid)) for grid in routing.grids.values())
        cells = heat_colours(np.array(routing.grids[view]) / (largest or 1.0))
    layer = Image.fromarray(cells).resize(found.seen.size, Image.Resampling.NEAREST)
    return Image.blend(found.seen, layer, min(max(opacity, 0.0), 1.0))


def name_of(model: str) -> str:
    """How a model is called on the page: its folder's name, and the one above where that says little."""
    path = Path(model)
    return "/".join(path.parts[-2:]) if path.name in ("model", "merged", "export") else path.name or "model"
