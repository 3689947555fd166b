"""The same question to two expert sets or models, side by side."""

import html
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import gradio as gr

from tove_llava.inference.engine import Engine
from tove_llava.serve.ui.conversation import BOX, CHATBOT, PASTED, Message, shown
from tove_llava.serve.ui.overlay import draw, legend, name_of, view_routing
from tove_llava.serve.ui.running import shown_errors
from tove_llava.serve.ui.session import AT_ONCE, Session, Settings


class Compare:
    """The tab, in gradio's current layout; both sides may share an engine."""

    def __init__(
        self, engines: tuple[Engine, Engine], session: Session, settings: list[Any], example: Mapping[str, Any] | None
    ) -> None:
        one_model = engines[0] is engines[1]
        with gr.Row(elem_id="tove-compare-head"):
            lead = (
                "The same question, read with two sets of experts" if one_model else "The same question to two models"
            )
            gr.Markdown(lead, elem_classes="tove-lead")
            self.stop = gr.Button("Stop both", size="sm", elem_id="tove-compare-stop", scale=0, min_width=110)
        self.entry = gr.MultimodalTextbox(
            value=dict(example) if example else None,
            **BOX,
            placeholder="Add an image and ask both sides about it",
            label="Question for both sides",
            max_plain_text_length=PASTED,
            elem_id="tove-compare-entry",
        )
        with gr.Row(elem_classes="tove-columns"):
            # With one model, one side starts with all experts and the other with none.
            starts = (True, not one_model)
            sides = [
                Side(engine, letter, session, start)
                for engine, letter, start in zip(engines, "AB", starts, strict=True)
            ]
        runs = []
        for side in sides:
            inputs = [self.entry, *settings, side.attached]
            quiet: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": AT_ONCE}
            runs.append(self.entry.submit(side.respond, inputs, side.page, trigger_mode="once", **quiet))
            runs.append(
                self.entry.submit(
                    side.map, [self.entry, side.attached], [side.drawing, side.legend], show_progress="hidden", **quiet
                )
            )
        self.stop.click(None, None, None, cancels=runs, api_visibility="private")
        self.sides = sides


class Side:
    """One column: toggles, the answer with its times, the map."""

    def __init__(self, engine: Engine, letter: str, session: Session, all_attached: bool) -> None:
        self._engine, self._session = engine, session
        experts = list(engine.experts)
        with gr.Column(min_width=300, elem_id=f"tove-side-{letter.lower()}"):
            gr.HTML(f'<h3 class="tove-side">{letter} <small>{html.escape(name_of(engine.name))}</small></h3>')
            self.attached = gr.CheckboxGroup(
                experts, value=experts if all_attached else [], label=f"Experts of {letter}", visible=bool(experts)
            )
            self.page = gr.Chatbot(
                **CHATBOT, feedback_options=None, height=130, placeholder=" ", elem_classes="tove-answer"
            )
            self.drawing = gr.Image(
                show_label=False, interactive=False, format="png", buttons=["fullscreen"], height=260,
                label=f"Routing of {letter}", alt_text=f"the image with the routing of {letter} drawn over it",
                visible=bool(experts), placeholder="no image yet", elem_classes="tove-map",
            )  # fmt: skip
            self.legend = gr.HTML("", visible=bool(experts))

    async def respond(
        self, message: Mapping[str, Any], system: str, temperature: float, top_p: float, tokens: float, attached: Any
    ) -> AsyncIterator[Any]:
        """Stream this side's answer."""
        with shown_errors():
            asked = [await self._session.in_thread(self._session.question, self._engine, message)]
            settings = Settings.of(self._engine, system, temperature, top_p, tokens, attached)
        yield shown([Message("assistant", "", note="...")])
        with shown_errors():
            async with aclosing(self._session.ask(self._engine, asked, settings)) as answers:
                async for answer in answers:
                    yield shown([answer.message])

    async def map(self, message: Mapping[str, Any], attached: Any) -> tuple[Any, str]:
        """Draw the map of the last image."""
        files = message.get("files") or []
        if not files or not self._engine.experts:
            return None, ""
        with shown_errors():
            view = await self._session.in_thread(view_routing, self._session, self._engine, str(files[-1]), attached)
        return draw(view), legend(view, self._engine.experts)
