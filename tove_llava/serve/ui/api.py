"""Endpoints for programs: ``/chat``, ``/routing`` and ``/compare``."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import anyio
import gradio as gr

from tove_llava.core.errors import DataError
from tove_llava.inference.engine import Engine
from tove_llava.serve.ui.conversation import Message, answered
from tove_llava.serve.ui.overlay import ALL, draw, view_routing
from tove_llava.serve.ui.running import shown_errors
from tove_llava.serve.ui.session import AT_ONCE, Answer, Session, Settings


class Api:
    """Hidden components and listeners; ``settings`` are the page's components."""

    def __init__(self, engines: tuple[Engine, Engine], session: Session, settings: list[Any]) -> None:
        self._engines, self._session = engines, session
        left, right = ([*engine.experts] for engine in engines)
        with gr.Group(visible=False):
            trigger = gr.Button()
            message = gr.MultimodalTextbox(label="message", file_types=["image"], file_count="multiple")
            messages = gr.State([])
            experts = gr.CheckboxGroup(left, value=left, label="experts")
            others = gr.CheckboxGroup(right, value=right, label="experts_b")
            answer, timing = gr.Textbox(label="answer"), gr.JSON(label="timing")
            picture = gr.File(label="picture", file_count="single", type="filepath")
            view = gr.Dropdown([ALL, *left], value=ALL, label="view")
            opacity = gr.Slider(0, 1, value=0.55, label="opacity")
            drawing, shares = gr.Image(label="drawing", format="png"), gr.JSON(label="weights")
            both = gr.JSON(label="answers")
        public: dict[str, Any] = {"concurrency_limit": AT_ONCE, "show_progress": "hidden"}
        trigger.click(
            self.chat, [message, messages, *settings, experts], [answer, timing, messages], api_name="chat", **public
        )
        trigger.click(self.routing, [picture, experts, view, opacity], [drawing, shares], api_name="routing", **public)
        trigger.click(self.compare, [message, *settings, experts, others], both, api_name="compare", **public)

    async def chat(
        self,
        message: Mapping[str, Any],
        messages: list[Message],
        system: str,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        experts: Sequence[str],
    ) -> AsyncIterator[tuple[str, Any, list[Message]]]:
        """Stream the answer to a question; a client's earlier turns are remembered.

        message: {"text": the question, "files": [images]}. experts: those that are attached.
        Returns the answer so far, and at its end the times of its stages in seconds.
        """
        engine = self._engines[0]
        with shown_errors():
            question = await self._session.in_thread(self._session.question, engine, message)
            asked = [*answered(messages), question]
            settings = Settings.of(engine, system, temperature, top_p, max_new_tokens, experts)
            async with aclosing(self._session.ask(engine, asked, settings)) as answers:
                async for answer in answers:
                    yield answer.message.text, _times(answer), [*asked, answer.message]

    async def routing(
        self, picture: str | None, experts: Sequence[str], view: str, opacity: float
    ) -> tuple[Any, dict[str, Any] | None]:
        """Draw which expert each part of an image listens to.

        view: "all experts", or an expert's name for only its weight. opacity: of the map, 0 to 1.
        Returns the drawing, and {"means": mean gate weight, "chosen": share of the tokens, "grids": weight of every
        token} by expert, or nothing where the model has no gate.
        """
        with shown_errors():
            if not picture:
                raise DataError("there is no image; give one")
            found = await self._session.in_thread(view_routing, self._session, self._engines[0], picture, experts)
        routing = found.routing
        weights = (
            None if routing is None else {"means": routing.means, "chosen": routing.chosen, "grids": routing.grids}
        )
        return draw(found, view, opacity), weights

    async def compare(
        self,
        message: Mapping[str, Any],
        system: str,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        experts_a: Sequence[str],
        experts_b: Sequence[str],
    ) -> list[dict[str, Any]]:
        """Ask both sets of experts (or both models) the same question.

        Returns [{"answer", "timing", "experts", "model"}] of A and of B.
        """
        found: list[dict[str, Any]] = [{}, {}]
        errors: list[Exception] = []

        async def ask(side: int, engine: Engine, settings: Settings, experts: Sequence[str]) -> None:
            try:
                async with aclosing(self._session.ask(engine, asked, settings)) as answers:
                    async for answer in answers:
                        found[side] = {"answer": answer.message.text, "timing": _times(answer)}
                found[side] |= {"experts": list(experts), "model": "AB"[side]}
            except Exception as error:
                errors.append(error)  # raised as it is once both have ended; the group would wrap it

        with shown_errors():
            asked = [await self._session.in_thread(self._session.question, self._engines[0], message)]
            sides = list(zip(self._engines, (experts_a, experts_b), strict=True))
            settings = [Settings.of(engine, system, temperature, top_p, max_new_tokens, each) for engine, each in sides]
            async with anyio.create_task_group() as group:
                for side, (engine, experts) in enumerate(sides):
                    group.start_soon(ask, side, engine, settings[side], experts)
            if errors:
                raise errors[0]
        return found


def _times(answer: Answer) -> dict[str, Any] | None:
    return None if answer.timing is None else asdict(answer.timing)
