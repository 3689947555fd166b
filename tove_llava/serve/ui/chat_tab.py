"""The chat: conversation, text box, and buttons for the last question."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr

from tove_llava.core.errors import ToveError
from tove_llava.inference.engine import Engine
from tove_llava.serve.ui.conversation import (
    BOX,
    CHATBOT,
    MAX_TEXT,
    PASTED,
    Message,
    answered,
    images,
    shown,
    unanswered,
)
from tove_llava.serve.ui.examples import Example
from tove_llava.serve.ui.panel import Panel
from tove_llava.serve.ui.running import Running, shown_errors
from tove_llava.serve.ui.session import AT_ONCE, Session, Settings

STOPPED = "stopped"
Update = tuple[Any, Any, list[Message], Any]  # box, page, conversation, image files


class Chat:
    """The tab, in gradio's current layout, with the panel next to it."""

    def __init__(self, engine: Engine, session: Session, examples: Sequence[Example], max_new_tokens: int) -> None:
        self._engine, self._session, self._examples = engine, session, list(examples)
        self.messages = gr.State([])
        self.running = gr.State(Running())  # one for each visitor, shared by all listeners
        with gr.Row(elem_classes="tove-columns"):
            with gr.Column(scale=5, min_width=320):
                self.page = gr.Chatbot(
                    **CHATBOT,
                    feedback_options=None,
                    allow_file_downloads=False,
                    height="58vh",
                    min_height=380,
                    placeholder="Add an image and ask about it, or begin with one of these.",
                    examples=[{"text": x.text, "files": [x.file]} for x in self._examples],
                    elem_id="tove-chat",
                )
                self.entry = gr.MultimodalTextbox(
                    **BOX,
                    placeholder="Add images and ask about them",
                    label="Question",
                    max_plain_text_length=PASTED,
                    elem_id="tove-entry",
                )
                with gr.Row(elem_classes="tove-actions"):
                    self.again = gr.Button("Regenerate", size="sm", elem_id="tove-again")
                    self.edit = gr.Button("Edit question", size="sm", elem_id="tove-edit")
                    self.new = gr.Button("New chat", size="sm", elem_id="tove-new")
                self.settings = sampling_inputs(max_new_tokens)
            with gr.Column(scale=3, min_width=300, elem_id="tove-panel", visible=bool(engine.experts)):
                self.panel = Panel(engine, session)
        self._listen()

    def _listen(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private"}
        out = [self.entry, self.page, self.messages, self.panel.files]
        inputs = [self.entry, self.messages, self.running, *self.settings, self.panel.attached]
        # One listener for all ways to ask, so that one page has one answer in the making.
        ways = [self.entry.submit, self.again.click, self.page.example_select]
        asking = gr.on(ways, self._respond, inputs, out, concurrency_limit=AT_ONCE, trigger_mode="once", **quiet)
        asking.then(lambda: _box(ready=True), None, self.entry, **quiet)  # also after an error
        # These end the answer by its reply: gradio's cancelling may let a last word through.
        self.entry.stop(Running.stop, self.running, None, **quiet)
        self.edit.click(self._edit, [self.messages, self.running], out, **quiet)
        self.new.click(self._begin, self.running, out, **quiet)
        self.page.clear(self._begin, self.running, out, **quiet)

    def _asked(self, event: Any, message: Mapping[str, Any], messages: Sequence[Message]) -> list[Message]:
        """Return the conversation that the event asks to be answered."""
        if _from(event, self.again):
            return unanswered(messages)
        if _from(event, self.page):
            example = self._examples[int(event.index)]
            message = {"text": example.text, "files": [example.file]}
        return [*answered(messages), self._session.question(self._engine, message)]

    async def _respond(
        self,
        message: Mapping[str, Any],
        messages: Sequence[Message],
        running: Running,
        system: str,
        temperature: float,
        top_p: float,
        tokens: float,
        attached: Sequence[str],
        event: gr.EventData,
    ) -> AsyncIterator[Update]:
        """Stream the answer. A refused question goes back into the box."""
        with shown_errors():
            asked = await self._session.in_thread(self._asked, event, message, messages)
            settings = Settings.of(self._engine, system, temperature, top_p, tokens, attached)
        typed = not _from(event, self.again, self.page)
        number = running.begin()
        # A typed question leaves the box.
        yield _box(value=None, ready=False) if typed else _box(ready=False), shown(asked), asked, images(asked)
        begun = False
        try:
            asking = self._session.ask(self._engine, asked, settings, partial(running.take, number))
            async with aclosing(asking) as answers:
                async for answer in answers:
                    if not running.is_current(number):
                        return
                    begun = True
                    reply = replace(answer.message, note=STOPPED) if running.stopped else answer.message
                    # A question without a word of an answer stays unanswered.
                    kept = [*asked, reply] if reply.text else asked
                    yield gr.skip(), shown([*asked, reply]), kept, gr.skip()
        except ToveError as error:
            if not begun and typed:
                yield _box(value=message), shown(messages), list(messages), images(messages)
            with shown_errors():
                raise error

    def _begin(self, running: Running) -> Update:
        running.leave()
        return _box(value=None, ready=True), [], [], []

    def _edit(self, messages: Sequence[Message], running: Running) -> Update:
        """Move the last question back into the box, without its answer."""
        running.leave()
        with shown_errors():
            *rest, last = unanswered(messages)
        return _box(value={"text": last.text, "files": list(last.images)}, ready=True), shown(rest), rest, images(rest)


def _from(event: gr.EventData, *components: Any) -> bool:
    return event.target is not None and event.target._id in [component._id for component in components]


def _box(ready: bool | None = None, **changes: Any) -> Any:
    """Update the text box, with a send or a stop button."""
    buttons = {} if ready is None else {"submit_btn": ready, "stop_btn": not ready}
    return gr.MultimodalTextbox(**changes, **buttons)


def sampling_inputs(max_new_tokens: int) -> list[Any]:
    """Build system prompt, temperature, top-p and longest answer, in ``Settings.of``'s order."""
    with gr.Accordion("Settings", open=False, elem_id="tove-settings"):
        system = gr.Textbox(
            value="",
            label="System prompt",
            placeholder="the model's own",
            lines=2,
            max_lines=6,
            max_length=MAX_TEXT,
            elem_id="tove-system",
        )
        with gr.Row():
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0: always the likeliest word")
            top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", info="draws only from the likeliest words")
            longest = gr.Slider(
                1,
                max(max_new_tokens, 1),
                value=max_new_tokens,
                step=1,
                label="Max tokens",
                info="where an answer is cut",
                elem_id="tove-longest",
            )
    return [system, temperature, top_p, longest]
