"""The contract of a record's dialect, and the registry of all."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from tove_llava.core.errors import DataError
from tove_llava.core.registry import Registry
from tove_llava.core.text import has_encoding, short
from tove_llava.data.templates.base import Turn, role_of
from tove_llava.data.tokenizer import IMAGE_PLACEHOLDER

#: keys of a record's images, all read alike
IMAGE_KEYS = ("image", "images", "image_path", "image_paths", "image_file", "image_files", "img", "img_path")

_MESSAGE = ("from", "value", "role", "content")
_IMAGE_LIKE = r"(image|img|picture|pic|photo|pixel_?value)s?"
_OTHER_MEDIA = r"(video|audio|movie|speech|sound)s?"
_FORM = r"(path|file|filename|url|uri|link|byte|base64|b64|data)s?"
_MEDIA_KEY = re.compile(rf"({_IMAGE_LIKE}|{_OTHER_MEDIA})([_-]?{_FORM})?", re.IGNORECASE)


class Image(NamedTuple):
    """An image of a record: its name, and its bytes where they lie in the data file."""

    name: str
    content: Any = None


class Content(NamedTuple):
    """The turns of a conversation, and the images that they carry themselves."""

    turns: list[Turn]
    images: list[Image]


#: readers of a conversation, by the record's key that holds it
DIALECTS: Registry[Callable[[Any], Content]] = Registry("dialect of records", "tove_llava.data.dialects")


def read_content(raw: dict[Any, Any]) -> Content:
    """Read a record's conversation and images.

    Raises:
        DataError: a part is missing, wrong, or a kind of media that nothing reads. The message lacks the record's name.
    """
    key = next((name for name in DIALECTS if raw.get(name) is not None), None)
    if key is None:
        known = " or ".join(repr(name) for name in DIALECTS)
        raise DataError(f"no {known} (keys: {', '.join(map(short, raw)) or 'none'})")
    turns, own = DIALECTS.get(key)(raw[key])
    turns = _with_system(raw.get("system"), turns)
    named = _named_images(raw)
    if own and named and [image.name for image in own] != [image.name for image in named]:
        raise DataError("images are named both in the messages and next to them; keep one of the two")
    _refuse_unread(raw, bool(own or named))
    return Content(turns, own or named)


def unread_keys(raw: dict[Any, Any]) -> list[str]:
    """List a record's and its messages' keys that nothing reads and that are harmless."""
    read = {"id", "system", *DIALECTS, *IMAGE_KEYS}
    found = [str(key) for key in raw if key not in read]
    for name in DIALECTS:
        messages = raw[name] if isinstance(raw.get(name), list) else []
        keys = {
            key: None for message in messages if isinstance(message, dict) for key in message if key not in _MESSAGE
        }
        found += [f"{name}.{key}" for key in keys]
    return found


def chat_turns(messages: Any, key: str) -> Content:
    """Read a list of messages with ``from`` and ``value``, or ``role`` and ``content``."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{key!r} must be a list of at least one turn; add the turns or delete the record")
    turns, images = [], []
    for number, message in enumerate(messages, start=1):
        names = ("from", "value")
        if isinstance(message, dict) and message.get("from") is None and "role" in message:
            names = ("role", "content")
        if not isinstance(message, dict) or names[0] not in message or names[1] not in message:
            raise DataError(
                f"turn {number} must be an object with 'from' and 'value' (or 'role' and 'content'), "
                f"not {short(message)}"
            )
        if len(message) > 2:
            images += (named := _named_images(message))
            _refuse_unread({key: each for key, each in message.items() if key not in _MESSAGE}, bool(named))
            if message.get("tool_calls") or message.get("function_call"):
                raise DataError(f"turn {number} calls a tool, which is not read; take the record out")
        role, value = message[names[0]], message[names[1]]
        role = role_of(role, f"turn {number}")
        if isinstance(value, list):
            value = _joined(value, number, images)
        if not isinstance(value, str):
            raise DataError(f"the value of turn {number} must be a string, not {short(value)}")
        if not has_encoding(value):
            raise DataError(f"the value of turn {number} holds half of a surrogate pair; repair its encoding")
        turns.append(Turn(role, value))
    return Content(turns, images)


def _joined(parts: list[Any], number: int, images: list[Image]) -> str:
    """Write typed parts as text with placeholders; collect the images that they name."""
    text, after_image = "", False
    for part in parts:
        given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        kind = given.pop("type", None)
        if kind == "text" and isinstance(given.get("text"), str):
            text += ("\n" if after_image else "") + given["text"]
            after_image = False
        elif kind == "image":
            _refuse_unread(given, any(key in given for key in (*IMAGE_KEYS, "path", "bytes")))
            own = next((given[key] for key in IMAGE_KEYS if key in given), None)
            if own is None and given.keys() & {"path", "bytes"}:
                own = {"path": given.get("path"), "bytes": given.get("bytes")}
            if own is not None:
                images.append(_image(own))
            elif given.keys() - {"text", "index"}:
                raise DataError(f"turn {number}: {short(part)} is not read; name a file in the image folder in 'image'")
            text += ("\n" if text else "") + IMAGE_PLACEHOLDER
            after_image = True
        else:
            raise DataError(
                f"turn {number} has a part of type {short(kind)} that is not read: {short(part)}; parts are "
                "{'type': 'text', 'text': ...} and {'type': 'image'}, whose file is named there or in 'images'"
            )
    return text


def _with_system(system: Any, turns: list[Turn]) -> list[Turn]:
    if system is None or system == "":
        return turns
    if not isinstance(system, str) or not has_encoding(system):
        raise DataError(f"'system' must be text, not {short(system)}")
    if turns[0].role == "system":
        if turns[0].text != system:
            raise DataError("two different system texts, in 'system' and in the first turn; keep one of the two")
        return turns
    return [Turn("system", system), *turns]


def _named_images(raw: dict[Any, Any]) -> list[Image]:
    found: dict[str, list[Image]] = {}
    for key in IMAGE_KEYS:
        value = raw.get(key)
        if value is None or value == []:
            continue
        try:
            found[key] = [_image(each) for each in (value if isinstance(value, list) else [value])]
        except DataError:
            raise DataError(f"{key!r} must be a file name or a list of file names, not {short(value)}") from None
    keys = list(found)
    for key in keys[1:]:
        if found[key] != found[keys[0]]:
            raise DataError(f"{keys[0]!r} and {key!r} name different images; keep one of the two")
    return found[keys[0]] if keys else []


def _image(value: Any) -> Image:
    """Read a file name, bytes, or ``{"path", "bytes"}`` as Hugging Face's data sets hold an image."""
    content = None
    if isinstance(value, dict) and value.keys() <= {"path", "bytes"}:
        content, value = value.get("bytes"), value.get("path") or ""
    elif not isinstance(value, str):
        content, value = value, ""
    if content is not None:
        try:
            memoryview(content)
        except TypeError:
            raise DataError("an image must be a file name or bytes") from None
    if not isinstance(value, str) or not (value or content is not None) or "\0" in value or not has_encoding(value):
        raise DataError("an image must be a file name or bytes")
    return Image(value, content)


def _refuse_unread(raw: dict[Any, Any], has_images: bool) -> None:
    """Refuse a key that means an image, a video or a sound and that nothing reads."""
    for key, value in raw.items():
        if key in IMAGE_KEYS or not isinstance(key, str) or value is None or value in ("", [], {}):
            continue
        kind = _media_kind(key)
        if kind is None or (kind == "image" and has_images):
            continue
        if kind == "other":
            raise DataError(f"{key!r} is not read: only images are; take the record out")
        raise DataError(
            f"{key!r} is not read, so its image would be missing; name a file in the image folder in 'image'"
        )


@lru_cache(maxsize=1024)
def _media_kind(key: str) -> str | None:
    match = _MEDIA_KEY.fullmatch(key)
    if match is None:
        return None
    return "image" if match[2] is not None else "other"
