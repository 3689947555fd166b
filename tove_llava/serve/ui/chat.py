"""The chat: conversation, box, and what can be done with the last question."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr

from tove_llava.core.errors import ToveError
from tove_llava.inference.engine import Engine
from tove_llava.serve.ui.answers import AT_ONCE, Desk, Settings
from tove_llava.serve.ui.conversation import PASTED, Said, answered, pictures, question, shown, unanswered
from tove_llava.serve.ui.examples import Example
from tove_llava.serve.ui.panel import Panel
from tove_llava.serve.ui.refusals import told
from tove_llava.serve.ui.running import Running
from tove_llava.serve.ui.settings import sampling_inputs

STOPPED = "stopped"
Update = tuple[Any, Any, list[Said], Any]  # box, page, conversation, picture files


class Chat:
    """Built where gradio's layout stands; the panel is beside it."""

    def __init__(self, engine: Engine, desk: Desk, examples: Sequence[Example], max_new_tokens: int) -> None:
        self._engine, self._desk, self._examples = engine, desk, list(examples)
        self.said = gr.State([])
        self.running = gr.State(Running())  # each visitor's own, and the same object in all of his listeners
        with gr.Row(elem_classes="tove-columns"):
            with gr.Column(scale=5, min_width=320):
                # sanitize_html is a second fence: shown() has escaped everything already.
                self.page = gr.Chatbot(
                    show_label=False,
                    render_markdown=False,
                    sanitize_html=True,
                    allow_file_downloads=False,
                    buttons=[],
                    feedback_options=None,
                    height="58vh",
                    min_height=380,
                    placeholder="Add a picture and ask about it, or begin with one of these.",
                    examples=[{"text": x.text, "files": [x.file]} for x in self._examples],
                    elem_id="tove-chat",
                )
                self.entry = gr.MultimodalTextbox(
                    file_types=["image"],
                    file_count="multiple",
                    sources=["upload"],
                    placeholder="Add pictures and ask about them",
                    label="Question",
                    show_label=False,
                    max_plain_text_length=PASTED,
                    elem_id="tove-entry",
                )
                with gr.Row(elem_classes="tove-actions"):
                    self.again = gr.Button("Regenerate", size="sm", elem_id="tove-again")
                    self.edit = gr.Button("Edit question", size="sm", elem_id="tove-edit")
                    self.new = gr.Button("New chat", size="sm", elem_id="tove-new")
                self.settings = sampling_inputs(max_new_tokens)
            with gr.Column(scale=3, min_width=300, elem_id="tove-panel", visible=bool(engine.experts)):
                self.panel = Panel(engine, desk)
        self._listen()

    def _listen(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private"}
        out = [self.entry, self.page, self.said, self.panel.files]
        inputs = [self.entry, self.said, self.running, *self.settings, self.panel.attached]
        # One listener for all ways to ask, so that one page has one answer in the making.
        ways = [self.entry.submit, self.again.click, self.page.example_select]
        asking = gr.on(ways, self._respond, inputs, out, concurrency_limit=AT_ONCE, trigger_mode="once", **quiet)
        asking.then(_ready, None, self.entry, **quiet)  # also after an error
        # These end the answer by its reply and not by gradio's cancelling, which may let a last word of it through.
        self.entry.stop(Running.stop, self.running, None, **quiet)
        self.edit.click(self._edit, [self.said, self.running], out, **quiet)
        self.new.click(self._begin_anew, self.running, out, **quiet)
        self.page.clear(self._begin_anew, self.running, out, **quiet)

    def _asked(self, event: Any, message: Mapping[str, Any], said: Sequence[Said]) -> list[Said]:
        """The conversation that the event asks to be answered."""
        if _from(event, self.again):
            return unanswered(said)
        if _from(event, self.page):
            example = self._examples[int(event.index)]
            return [*answered(said), question({"text": example.text, "files": [example.file]})]
        return [*answered(said), question(message)]

    async def _respond(
        self,
        message: Mapping[str, Any],
        said: Sequence[Said],
        running: Running,
        system: str,
        temperature: float,
        top_p: float,
        tokens: float,
        attached: Sequence[str],
        event: gr.EventData,
    ) -> AsyncIterator[Update]:
        """Streams the answer. A refused question goes back into the box."""
        with told():
            asked = await self._desk.guarded(partial(self._asked, event, message, said))
            experts = attached if self._engine.experts else None
            choices = Settings.of(system, temperature, top_p, tokens, experts)
        typed = not _from(event, self.again, self.page)
        number = running.begin()
        # The box is emptied only of what was asked.
        yield _box(value=None, ready=False) if typed else _box(ready=False), shown(asked), asked, pictures(asked)
        begun = False
        try:
            asking = self._desk.ask(self._engine, asked, choices, partial(running.take, number))
            async with aclosing(asking) as answers:
                async for answer in answers:
                    if not running.is_current(number):
                        return
                    begun = True
                    turn = replace(answer.turn, note=STOPPED) if running.stopped else answer.turn
                    # Without a word of its answer the question stays one without an answer.
                    kept = [*asked, turn] if turn.text else asked
                    yield gr.skip(), shown([*asked, turn]), kept, gr.skip()
        except ToveError as error:
            if not begun and typed:
                yield _box(value=message), shown(said), list(said), pictures(said)
            with told():
                raise error

    def _begin_anew(self, running: Running) -> Update:
        running.leave()
        return _box(value=None, ready=True), [], [], []

    def _edit(self, said: Sequence[Said], running: Running) -> Update:
        """Takes the last question and its answer out of the conversation and puts the question into the box."""
        running.leave()
        with told():
            asked = unanswered(said)
        rest, last = asked[:-1], asked[-1]
        value = {"text": last.text, "files": list(last.files)}
        return _box(value=value, ready=True), shown(rest), rest, pictures(rest)


def _from(event: gr.EventData, *components: Any) -> bool:
    return event.target is not None and event.target._id in [component._id for component in components]


def _box(ready: bool | None = None, **changes: Any) -> Any:
    """The text box, with a button to send or one to stop."""
    buttons = {} if ready is None else {"submit_btn": ready, "stop_btn": not ready}
    return gr.MultimodalTextbox(**changes, **buttons)


def _ready() -> Any:
    return _box(ready=True)
