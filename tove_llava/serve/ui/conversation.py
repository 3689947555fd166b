"""A conversation: from gradio's components, and as the page shows it."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.inference import engine

# Options of every gradio.Chatbot and of every box for questions. sanitize_html is a second fence after shown().
CHATBOT: dict[str, Any] = {"show_label": False, "render_markdown": False, "sanitize_html": True, "buttons": []}
BOX: dict[str, Any] = {"file_types": ["image"], "file_count": "multiple", "sources": ["upload"], "show_label": False}
MAX_TEXT = 8_000  # characters of one question, and of the system prompt
PASTED = 1_000_000  # length from which the box makes a pasted text a file; MAX_TEXT refuses it before


@dataclass(frozen=True)
class Message(engine.Message):
    """A typed or generated message; ``images`` are files in gradio's folder.

    Attributes:
        note: shown below an answer, and no part of it.
    """

    note: str = ""


def checked_text(text: str, what: str) -> str:
    """Return ``text`` if it is not too long; else raise a DataError."""
    if len(text) > MAX_TEXT:
        raise DataError(f"the {what} has {len(text)} characters; at most {MAX_TEXT} are taken")
    return text


def unanswered(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation up to its last question.

    Raises:
        DataError: there is none.
    """
    ends = [index for index, message in enumerate(messages, start=1) if message.role == "user"]
    if not ends:
        raise DataError("nothing has been asked yet")
    return list(messages[: ends[-1]])


def answered(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation without a last question that has no answer."""
    return list(messages[:-1]) if messages and messages[-1].role == "user" else list(messages)


def images(messages: Sequence[Message]) -> list[Any]:
    """Return all image files, in order."""
    return [file for message in messages for file in message.images]


def shown(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert a conversation for gradio's chatbot; all text is escaped."""
    entries: list[dict[str, Any]] = []
    for each in messages:
        entries += [{"role": each.role, "content": {"path": file, "alt_text": "the image"}} for file in each.images]
        if each.text:
            entries.append({"role": each.role, "content": html.escape(each.text)})
        if each.note:
            note = f'<span class="tove-note">{html.escape(each.note)}</span>'
            entries.append({"role": each.role, "content": note})
    return entries
