"""A conversation between what gradio's components hold, what the engine takes, and what the page shows."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.data.images import open_image
from tove_llava.inference.engine import Message

MAX_PIXELS = 40_000_000  # decoded, a picture of this size takes 120 MB
MAX_PICTURES = 8  # of one question
MAX_TEXT = 8_000  # characters of one question, and of the system prompt
PASTED = 1_000_000  # characters from which on the box makes a file of a pasted text; what is too long is said before


@dataclass(frozen=True)
class Said:
    """One turn of a conversation, as it was typed or generated.

    Attributes:
        files: pictures of a question, as paths in gradio's own folder.
        note: shown below an answer, and no part of it.
    """

    role: str  # "user" or "assistant"
    text: str
    files: tuple[str, ...] = ()
    note: str = ""


def question(message: Mapping[str, Any]) -> Said:
    """What gradio's text box gives (``{"text": str, "files": [path]}``), its pictures looked at.

    Raises:
        DataError: nothing is asked, the text is too long, or a file is not a picture of acceptable size.
    """
    text = checked_text(str(message.get("text") or ""), "question")
    files = tuple(str(file) for file in message.get("files") or [])
    if not text.strip():
        raise DataError("the question is empty; type one")
    if len(files) > MAX_PICTURES:
        raise DataError(f"{len(files)} pictures with one question; at most {MAX_PICTURES} are taken")
    for file in files:
        picture(file)
    return Said("user", text, files)


def checked_text(text: str, what: str) -> str:
    """``text``, if it is not too long; else a DataError."""
    if len(text) > MAX_TEXT:
        raise DataError(f"the {what} has {len(text)} characters; at most {MAX_TEXT} are taken")
    return text


def picture(file: str) -> Any:
    """A picture file opened and decoded.

    Raises:
        DataError: it is no picture, damaged, or has too many pixels. The message has its name alone, not its folder.
    """
    return open_image(file, max_pixels=MAX_PIXELS, name=Path(file).name)


def unanswered(said: Sequence[Said]) -> list[Said]:
    """The conversation up to its last question.

    Raises:
        DataError: there is none.
    """
    for place in range(len(said) - 1, -1, -1):
        if said[place].role == "user":
            return list(said[: place + 1])
    raise DataError("nothing has been asked yet")


def answered(said: Sequence[Said]) -> list[Said]:
    """The conversation without a last question that has no answer."""
    return list(said[:-1]) if said and said[-1].role == "user" else list(said)


def pictures(said: Sequence[Said]) -> list[str]:
    """All picture files, in order."""
    return [file for turn in said for file in turn.files]


def messages(said: Sequence[Said]) -> list[Message]:
    """The conversation as the engine takes it, its pictures opened; errors as of :func:`picture`."""
    return [Message(turn.role, turn.text, [picture(file) for file in turn.files]) for turn in said]


def shown(said: Sequence[Said]) -> list[dict[str, Any]]:
    """The conversation as gradio displays it. What people and models write is shown as it is, never as HTML."""
    entries: list[dict[str, Any]] = []
    for turn in said:
        entries += [{"role": turn.role, "content": {"path": file, "alt_text": "the picture"}} for file in turn.files]
        if turn.text:
            entries.append({"role": turn.role, "content": html.escape(turn.text)})
        if turn.note:
            note = f'<span class="tove-note">{html.escape(turn.note)}</span>'
            entries.append({"role": turn.role, "content": note})
    return entries
