"""Endpoints for programs: ``/chat``, ``/routing`` and ``/compare``. The page's own listeners are private."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from typing import Any

import anyio
import gradio as gr

from tove_llava.core.errors import DataError
from tove_llava.inference.engine import Engine
from tove_llava.serve.ui.answers import AT_ONCE, Answer, Desk, Settings
from tove_llava.serve.ui.conversation import Said, answered, question
from tove_llava.serve.ui.overlay import ALL, draw, look, views
from tove_llava.serve.ui.refusals import told


class Api:
    """Hidden components and listeners.

    Args:
        engines: of the left and the right side of a comparison; the left one answers chats.
        settings: components of the page for the system prompt and the sampling; their values are the defaults.
    """

    def __init__(self, engines: tuple[Engine, Engine], desk: Desk, settings: list[Any]) -> None:
        self._engines, self._desk = engines, desk
        left, right = ([*engine.experts] for engine in engines)
        with gr.Group(visible=False):
            trigger = gr.Button()
            message = gr.MultimodalTextbox(label="message", file_types=["image"], file_count="multiple")
            said = gr.State([])
            experts = gr.CheckboxGroup(left, value=left, label="experts")
            others = gr.CheckboxGroup(right, value=right, label="experts_b")
            answer, timing = gr.Textbox(label="answer"), gr.JSON(label="timing")
            picture = gr.File(label="picture", file_count="single", type="filepath")
            view = gr.Dropdown(views(left), value=ALL, label="view")
            opacity = gr.Slider(0, 1, value=0.55, label="opacity")
            drawing, shares = gr.Image(label="drawing", format="png"), gr.JSON(label="weights")
            both = gr.JSON(label="answers")
        public: dict[str, Any] = {"concurrency_limit": AT_ONCE, "show_progress": "hidden"}
        trigger.click(self.chat, [message, said, *settings, experts], [answer, timing, said], api_name="chat", **public)
        trigger.click(self.routing, [picture, experts, view, opacity], [drawing, shares], api_name="routing", **public)
        trigger.click(self.compare, [message, *settings, experts, others], both, api_name="compare", **public)

    async def chat(
        self,
        message: Mapping[str, Any],
        said: list[Said],
        system: str,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        experts: Sequence[str],
    ) -> AsyncIterator[tuple[str, Any, list[Said]]]:
        """Asks a question about pictures and streams the answer. A client's earlier turns are remembered.

        message: {"text": the question, "files": [pictures]}. experts: those that are attached.
        Returns the answer so far, and at its end the times of its stages in seconds.
        """
        engine = self._engines[0]
        with told():
            asked = [*answered(said), await self._desk.guarded(partial(question, message))]
            choices = _settings(engine, system, temperature, top_p, max_new_tokens, experts)
            async with aclosing(self._desk.ask(engine, asked, choices)) as answers:
                async for found in answers:
                    yield found.turn.text, _times(found), [*asked, found.turn]

    async def routing(
        self, picture: str | None, experts: Sequence[str], view: str, opacity: float
    ) -> tuple[Any, dict[str, Any] | None]:
        """Draws which expert each part of a picture listens to.

        view: "all experts", or an expert's name for its weight alone. opacity: of the map, 0 to 1.
        Returns the drawing, and {"means": mean gate weight, "chosen": share of the tokens, "grids": weight of every
        token} by expert, or nothing where the model has no gate.
        """
        with told():
            if not picture:
                raise DataError("there is no picture; give one")
            engine = self._engines[0]
            found = await self._desk.guarded(partial(look, engine, picture, tuple(experts) if engine.experts else None))
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
        """Asks two sets of experts (of two models, where the page was started with --compare) the same question.

        Returns [{"answer", "timing", "experts", "model"}] of A and of B.
        """
        found: list[dict[str, Any]] = [{}, {}]

        async def side(place: int, engine: Engine, experts: Sequence[str], choices: Settings) -> None:
            async with aclosing(self._desk.ask(engine, asked, choices)) as answers:
                async for answer in answers:
                    told_so = {"answer": answer.turn.text, "timing": _times(answer)}
                    found[place] = {**told_so, "experts": list(experts), "model": "AB"[place]}

        with told():
            asked = [await self._desk.guarded(partial(question, message))]
            sides = [
                (engine, experts, _settings(engine, system, temperature, top_p, max_new_tokens, experts))
                for engine, experts in zip(self._engines, (experts_a, experts_b), strict=True)
            ]
            await _together(partial(side, place, *given) for place, given in enumerate(sides))
        return found


def _settings(
    engine: Engine, system: str, temperature: float, top_p: float, tokens: float, experts: Sequence[str]
) -> Settings:
    return Settings.of(system, temperature, top_p, tokens, experts if engine.experts else None)


def _times(answer: Answer) -> dict[str, Any] | None:
    return None if answer.timing is None else asdict(answer.timing)


async def _together(jobs: Any) -> None:
    """Runs them at the same time; the first error is raised as it is, once all have ended."""
    errors: list[Exception] = []

    async def run(job: Any) -> None:
        try:
            await job()
        except Exception as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        for job in jobs:
            group.start_soon(run, job)
    if errors:
        raise errors[0]
