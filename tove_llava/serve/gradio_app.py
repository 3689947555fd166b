"""The demo in the browser: ``python -m tove_llava.serve.gradio_app [--model DIR]`` (= ``tove-llava serve``)."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_llava.data.images import open_image
from tove_llava.errors import ConfigError, DataError, ToveError
from tove_llava.serve.engine import Engine, Message

MAX_UPLOAD = "20mb"
MAX_PIXELS = 40_000_000  # decoded, a picture of this size takes 120 MB
MAX_TEXT = 8_000  # characters of one question
WAITING = 20  # people in the queue; more are told to come back


def build_app(engine: Engine, max_new_tokens: int = 256) -> Any:
    """A chat page over an engine.

    Returns:
        a ``gradio.ChatInterface``; its API endpoint is ``/chat``.

    Raises:
        ConfigError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError("the demo needs gradio; install it: pip install 'tove-llava[demo]'") from error

    def respond(message: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        try:
            answer = ""
            for piece in engine.stream(conversation(message, history), max_new_tokens=max_new_tokens):
                answer += piece
                yield answer
        except ToveError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return gr.ChatInterface(
        respond,
        multimodal=True,
        # What people and models write is shown as the text that it is: neither HTML nor Markdown.
        chatbot=gr.Chatbot(
            render_markdown=False, sanitize_html=True, allow_tags=False, height="65vh", label=engine.name
        ),
        textbox=gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            placeholder="Add a picture and ask about it",
            max_plain_text_length=MAX_TEXT,
        ),
        title="ToVE-LLaVA",
        description=None,
        flagging_mode="never",
        analytics_enabled=False,
        concurrency_limit=1,  # one model: answers are generated one after another
        delete_cache=(3600, 86400),  # uploads go after a day
        api_name="chat",
    )


def conversation(message: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The chat so far and the new message, as the engine takes it.

    Args:
        message: ``{"text": str, "files": [path]}``.
        history: gradio's messages; pictures stand as messages of their own in front of the text, and are joined to it.

    Raises:
        DataError: the text is too long, or a file is not a picture of acceptable size.
    """
    turns: list[tuple[str, list[str], list[str]]] = []
    for entry in history:
        texts, files = _contents(entry["content"])
        if turns and turns[-1][0] == entry["role"]:
            turns[-1][1].extend(texts)
            turns[-1][2].extend(files)
        else:
            turns.append((entry["role"], texts, files))
    new_text, new_files = str(message.get("text") or ""), [_path(file) for file in message.get("files") or []]
    if turns and turns[-1][0] == "user":  # its answer failed; the new message goes on from it
        turns[-1][1].append(new_text)
        turns[-1][2].extend(new_files)
    else:
        turns.append(("user", [new_text], new_files))
    messages = []
    for role, texts, files in turns:
        text = "\n".join(part for part in texts if part)
        if len(text) > MAX_TEXT:
            raise DataError(f"the message has {len(text)} characters; at most {MAX_TEXT} are taken")
        messages.append(Message(role, text, [open_image(file, max_pixels=MAX_PIXELS) for file in files]))
    return messages


def _contents(content: Any) -> tuple[list[str], list[str]]:
    """Texts and files of one gradio message, whose content is a text, a file or a list of both."""
    texts: list[str] = []
    files: list[str] = []
    for part in content if isinstance(content, list | tuple) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text":
            texts.append(str(part.get("text", "")))
        else:
            files.append(_path(part))
    return texts, files


def _path(file: Any) -> str:
    """The path in a gradio file entry (a path, ``{"path": ...}`` or ``{"type": "file", "file": {"path": ...}}``)."""
    if isinstance(file, Mapping):
        file = file.get("file", file)
        if isinstance(file, Mapping):
            file = file.get("path")
    if not isinstance(file, str | Path):
        raise DataError("the message has something that is neither text nor a picture; remove it")
    return str(file)


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
