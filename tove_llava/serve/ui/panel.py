"""The panel next to the chat: routing, legend and expert toggles."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tove_llava.inference.engine import Engine
from tove_llava.serve.ui.overlay import ALL, RoutingView, draw, legend, view_routing
from tove_llava.serve.ui.running import shown_errors
from tove_llava.serve.ui.session import AT_ONCE, Session


class Panel:
    """The panel, in gradio's current layout.

    Attributes:
        attached: a CheckboxGroup of the experts.
        files: a State with the images of the conversation; its change draws the last one.
    """

    def __init__(self, engine: Engine, session: Session) -> None:
        self._engine, self._session = engine, session
        experts = list(engine.experts)
        self.files = gr.State([])
        self._view = gr.State(None)
        gr.Markdown("### Which expert sees what", elem_classes="tove-title")
        self._map = gr.Image(
            label="Routing over the image",
            show_label=False,
            interactive=False,
            format="png",
            buttons=["fullscreen"],
            height=300,
            elem_id="tove-map",
            alt_text="the image with the routing drawn over it",
            placeholder="no image yet",
        )
        self._legend = gr.HTML(legend(None, experts), elem_id="tove-legend")
        self.image = gr.Radio([], label="Image", visible=False, elem_id="tove-picture")
        self._choice = gr.Radio([ALL, *experts], value=ALL, label="Show", elem_id="tove-view")
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
        drawn = [self._view, self._map, self._legend]
        seen = [self.files, self.image, self.attached, self._choice, self._opacity]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": AT_ONCE}
        # Drawn when the user chooses, and when the images change.
        self.files.change(self._choices, self.files, self.image, **quiet).then(self._run, seen, drawn, **quiet)
        self.image.input(self._run, seen, drawn, **quiet)
        self.attached.input(self._run, seen, drawn, trigger_mode="always_last", **quiet)
        redrawn = [self._map, self._legend]
        shown = [self._view, self._choice, self._opacity]
        self._choice.input(self._draw, shown, redrawn, trigger_mode="always_last", **quiet)
        self._opacity.input(self._draw, shown, redrawn, trigger_mode="always_last", **quiet)

    def _choices(self, files: Sequence[str]) -> Any:
        names = [(f"{number}: {Path(file).name}", number - 1) for number, file in enumerate(files, start=1)]
        return gr.Radio(choices=names, value=len(files) - 1 if files else None, visible=len(files) > 1)

    async def _run(
        self, files: Sequence[str], index: int | None, attached: Sequence[str], choice: str, opacity: float
    ) -> tuple[RoutingView | None, Any, str]:
        """Run the tower on the chosen image."""
        if not files:
            return None, None, legend(None, self._engine.experts)
        file = files[index if index is not None and 0 <= index < len(files) else -1]
        with shown_errors():
            view = await self._session.in_thread(view_routing, self._session, self._engine, file, attached)
        return view, *self._draw(view, choice, opacity)

    def _draw(self, view: RoutingView | None, choice: str, opacity: float) -> tuple[Any, str]:
        """Draw without running the model."""
        return None if view is None else draw(view, choice, opacity), legend(view, self._engine.experts, choice)
