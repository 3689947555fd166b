"""The demo in the browser: ``python -m tove_llava.serve.gradio_app [--model DIR]`` (= ``tove-llava serve``)."""

import html
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tove_llava.data.images import open_image
from tove_llava.errors import ConfigError, DataError, ToveError
from tove_llava.serve.engine import Engine, Message

MAX_UPLOAD = "20mb"
MAX_PIXELS = 40_000_000  # decoded, a picture of this size takes 120 MB
MAX_TEXT = 8_000  # characters of one question
WAITING = 20  # people in the queue; more are told to come back


@dataclass(frozen=True)
class Said:
    """One turn of a conversation, as it was typed or generated."""

    role: str  # "user" or "assistant"
    text: str
    files: tuple[str, ...] = ()


def build_app(engine: Engine, max_new_tokens: int = 256) -> Any:
    """A chat page over an engine.

    Returns:
        a ``gradio.Blocks``; its API endpoint is ``/chat``.

    Raises:
        ConfigError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError("the demo needs gradio; install it: pip install 'tove-llava[demo]'") from error

    def box(**changes: Any) -> Any:
        return gr.MultimodalTextbox(**changes)

    def chat(
        message: Mapping[str, Any], said: Sequence[Said]
    ) -> Iterator[tuple[Any, list[dict[str, Any]], list[Said]]]:
        try:
            asked = [*said, question(message)]
            # Checks everything first, so that a refused message stays in the box.
            pieces = engine.stream(messages(asked), max_new_tokens=max_new_tokens)
            yield box(value=None, submit_btn=False, stop_btn=True), shown(asked), list(said)
            answer = ""
            for piece in pieces:
                answer += piece
                so_far = [*asked, Said("assistant", answer)]
                yield box(), shown(so_far), so_far
        except ToveError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    def ready() -> Any:
        return box(submit_btn=True, stop_btn=False)

    with gr.Blocks(title="ToVE-LLaVA", analytics_enabled=False, delete_cache=(3600, 86400)) as app:
        gr.Markdown("# ToVE-LLaVA")
        # sanitize_html is a second fence: shown() has escaped everything already.
        page = gr.Chatbot(
            label=Path(engine.name).name or "model",
            render_markdown=False,
            sanitize_html=True,
            buttons=["copy"],
            height="65vh",
        )
        said = gr.State([])
        entry = gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            placeholder="Add a picture and ask about it",
            show_label=False,
            max_plain_text_length=MAX_TEXT,
        )
        new = gr.Button("New conversation", size="sm")

        # One model: answers are generated one after another.
        asking = entry.submit(chat, [entry, said], [entry, page, said], api_name="chat", concurrency_limit=1)
        asking.then(ready, None, entry, api_visibility="private")  # also after an error
        entry.stop(ready, None, entry, cancels=[asking], api_visibility="private")
        new.click(lambda: ([], []), None, [page, said], cancels=[asking], api_visibility="private")
        page.clear(list, None, said, api_visibility="private")
    return app


def question(message: Mapping[str, Any]) -> Said:
    """What gradio's text box gives (``{"text": str, "files": [path]}``).

    Raises:
        DataError: the text is too long.
    """
    text = str(message.get("text") or "")
    if len(text) > MAX_TEXT:
        raise DataError(f"the message has {len(text)} characters; at most {MAX_TEXT} are taken")
    return Said("user", text, tuple(str(file) for file in message.get("files") or []))


def messages(said: Sequence[Said]) -> list[Message]:
    """The conversation as the engine takes it, its pictures opened.

    Raises:
        DataError: a file is not a picture of acceptable size.
    """
    return [
        Message(turn.role, turn.text, [open_image(file, max_pixels=MAX_PIXELS) for file in turn.files]) for turn in said
    ]


def shown(said: Sequence[Said]) -> list[dict[str, Any]]:
    """The conversation as gradio displays it. What people and models write is shown as it is, never as HTML."""
    entries: list[dict[str, Any]] = []
    for turn in said:
        entries += [{"role": turn.role, "content": {"path": file}} for file in turn.files]
        entries.append({"role": turn.role, "content": html.escape(turn.text)})
    return entries


def launch(engine: Engine, host: str, port: int | None, max_new_tokens: int = 256, block: bool = True) -> Any:
    """Serve until interrupted, or, without ``block``, until ``close`` is called on what is returned.

    Raises:
        ConfigError: gradio is not installed, or the port is taken.
    """
    app = build_app(engine, max_new_tokens).queue(max_size=WAITING)
    try:
        app.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=MAX_UPLOAD,
            show_error=True,
            prevent_thread_lock=not block,
            footer_links=["api"],
        )
    except OSError as error:
        raise ConfigError(
            f"the demo cannot listen on {host}:{port or '7860 to 7959'}: {error}; choose --port"
        ) from error
    return app


if __name__ == "__main__":
    from tove_llava.cli import main

    sys.exit(main(["serve", *sys.argv[1:]]))
