"""What stands between clients and ``transformers serve``.

That server also loads any model by name, and opens pictures by path and by address. Here only what a chat needs gets
through: pictures come with the request, are of bounded size, and are decoded once before they are handed on.
"""

import asyncio
import base64
import binascii
import io
import json
from collections.abc import Awaitable, Callable
from typing import Any

from tove_llava.core.errors import DataError
from tove_llava.data import IMAGE_PLACEHOLDER, open_image

MAX_BODY = 64 * 2**20  # bytes
MAX_PIXELS = 40_000_000  # decoded, a picture of this size takes 120 MB
MAX_IMAGES = 16
WAITING = 64  # requests at a time

# Others reach into the server: which template is rendered, how much is generated.
KEYS = ("model", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "frequency_penalty", "stream")

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"


class Guard:
    """An ASGI application around another.

    Args:
        app: the server's.
        model: the name by which requests call the model.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], model: str) -> None:
        self.app = app
        self.model = model
        self._inside = 0

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # start and end of the server
            await self.app(scope, receive, send)
            return
        asked = (scope["method"], scope["path"])
        if asked == ("POST", CHAT):
            await self._chat(scope, receive, send)
        elif asked == ("GET", MODELS):
            entry = {"id": self.model, "object": "model", "created": 0, "owned_by": "tove-llava"}
            await _reply(send, 200, {"object": "list", "data": [entry]})
        elif asked == ("GET", HEALTH):
            await self.app(scope, receive, send)
        else:
            await _refuse(send, 404, f"there is no {asked[0]} {asked[1]} here; use POST {CHAT} or GET {MODELS}")

    async def _chat(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if self._inside >= WAITING:
            await _refuse(send, 503, f"{WAITING} requests are being answered; try again in a moment")
            return
        self._inside += 1
        try:
            body = await _read(receive)
            if body is None:
                await _refuse(send, 413, f"the request is larger than {MAX_BODY // 2**20} MB; send smaller pictures")
                return
            try:
                await asyncio.to_thread(check_request, body)  # pictures take a while
            except DataError as error:
                await _refuse(send, 400, str(error))
                return
            await self.app(scope, _again(body, receive), send)
        finally:
            self._inside -= 1


def check_request(body: bytes) -> None:
    """Raises DataError for a chat request with anything but roles, text, pictures as base64, and :data:`KEYS`."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the request is not JSON: {error}") from error
    messages = request.get("messages") if isinstance(request, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError("the request has no list of messages")
    unknown = sorted(set(request) - set(KEYS))
    if unknown:
        raise DataError(f"the request has {', '.join(unknown)}, which is not taken here; it may have {', '.join(KEYS)}")
    images = 0
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError("a message is an object with a role and a content")
        content = message.get("content")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else _parts(content):
            images += _check_part(part)
    if images > MAX_IMAGES:
        raise DataError(f"the conversation has {images} pictures; at most {MAX_IMAGES} are taken")


def _parts(content: object) -> list[Any]:
    if not isinstance(content, list):
        raise DataError("a message's content is a text or a list of parts")
    return content


def _check_part(part: object) -> int:
    """How many pictures a part of a message is: 0 or 1."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        if IMAGE_PLACEHOLDER in part["text"]:
            raise DataError(f"the text contains {IMAGE_PLACEHOLDER}, which stands for a picture; take it out")
        return 0
    if isinstance(part, dict) and kind == "image_url":
        holder = part.get("image_url")
        _check_picture(holder.get("url") if isinstance(holder, dict) else holder)
        return 1
    raise DataError(f"a part of a message is of type 'text' or 'image_url', not {kind!r}")


def _check_picture(url: object) -> None:
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma or "," in data:
        raise DataError("a picture comes with the request: image_url is data:image/...;base64,...")
    try:
        raw = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise DataError(f"a picture is not valid base64: {error}") from error
    open_image(io.BytesIO(raw), max_pixels=MAX_PIXELS, name="the picture")


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None when it is too large."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives the body once more, then what comes behind it: that the client has gone."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay


async def _refuse(send: Send, status: int, message: str) -> None:
    await _reply(send, status, {"error": {"message": message, "type": "invalid_request_error"}})


async def _reply(send: Send, status: int, content: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})
