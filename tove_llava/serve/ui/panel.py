"""The panel beside the chat: the routing over the picture, its legend, and a toggle for each expert."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from tove_llava.inference.engine import Engine
from tove_llava.serve.ui.answers import AT_ONCE, Desk
from tove_llava.serve.ui.legend import legend
from tove_llava.serve.ui.overlay import ALL, Look, draw, look, views
from tove_llava.serve.ui.refusals import told


class Panel:
    """Built where gradio's layout stands.

    Args:
        desk: runs what decodes pictures.

    Attributes:
        attached: a CheckboxGroup of the experts.
        files: a State with the pictures of the conversation; its change draws the last one.
    """

    def __init__(self, engine: Engine, desk: Desk) -> None:
        self._engine, self._desk = engine, desk
        experts = list(engine.experts)
        self.files = gr.State([])
        self._look = gr.State(None)
        gr.Markdown("### Which expert sees what", elem_classes="tove-title")
        self._map = gr.Image(
            label="Routing over the picture",
            show_label=False,
            interactive=False,
            format="png",
            buttons=["fullscreen"],
            height=300,
            elem_id="tove-map",
            alt_text="the picture with the routing drawn over it",
            placeholder="no picture yet",
        )
        self._legend = gr.HTML(legend(None, experts), elem_id="tove-legend")
        self.picture = gr.Radio([], label="Picture", visible=False, elem_id="tove-picture")
        self._view = gr.Radio(views(experts), value=ALL, label="Show", elem_id="tove-view")
        self._opacity = gr.Slider(0, 1, value=0.55, step=0.05, label="Opacity of the map", elem_id="tove-opacity")
        self.attached = gr.CheckboxGroup(
            experts,
            value=experts,
            label="Attached experts",
            info="Detach one: the map and the next answer go without it.",
            elem_id="tove-attached",
        )
        self._listen()

    def _listen(self) -> None:
        drawn = [self._look, self._map, self._legend]
        seen = [self.files, self.picture, self.attached, self._view, self._opacity]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": AT_ONCE}
        # A change of the choice draws; new pictures only change the choice, or draw where it stays.
        self.files.change(self._choices, self.files, self.picture, **quiet).then(self._run, seen, drawn, **quiet)
        self.picture.input(self._run, seen, drawn, **quiet)
        self.attached.input(self._run, seen, drawn, trigger_mode="always_last", **quiet)
        redrawn = [self._map, self._legend]
        shown = [self._look, self._view, self._opacity]
        self._view.input(self._draw, shown, redrawn, trigger_mode="always_last", **quiet)
        self._opacity.input(self._draw, shown, redrawn, trigger_mode="always_last", **quiet)

    def _choices(self, files: Sequence[str]) -> Any:
        names = [(f"{place}: {Path(file).name}", place - 1) for place, file in enumerate(files, start=1)]
        return gr.Radio(choices=names, value=len(files) - 1 if files else None, visible=len(files) > 1)

    async def _run(
        self, files: Sequence[str], place: int | None, attached: Sequence[str], view: str, opacity: float
    ) -> tuple[Look | None, Any, str]:
        """Runs the tower on the chosen picture."""
        if not files:
            return None, None, legend(None, self._engine.experts)
        file = files[place if place is not None and 0 <= place < len(files) else -1]
        with told():
            found = await self._desk.guarded(partial(look, self._engine, file, tuple(attached)))
        return found, *self._draw(found, view, opacity)

    def _draw(self, found: Look | None, view: str, opacity: float) -> tuple[Any, str]:
        """Draws what is known already; the model does not run."""
        return None if found is None else draw(found, view, opacity), legend(found, self._engine.experts, view)
