"""The guard between clients and ``transformers serve``.

That server also loads any model by name, and opens images by path and by address. The guard passes only chats: images
come with the request, have a bounded size, and are decoded once before they are handed on.
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
MAX_PIXELS = 40_000_000  # decoded, an image of this size takes 120 MB
MAX_IMAGES = 16
WAITING = 64  # requests at a time

# Other keys change the server: the template, the length of answers.
KEYS = ("model", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "frequency_penalty", "stream")

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"


class Guard:
    """An ASGI application around the server's ``app``; requests call the model ``model``."""

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
                await _refuse(send, 413, f"the request is larger than {MAX_BODY // 2**20} MB; send smaller images")
                return
            try:
                await asyncio.to_thread(check_request, body)  # decodes images
            except DataError as error:
                await _refuse(send, 400, str(error))
                return
            await self.app(scope, _again(body, receive), send)
        finally:
            self._inside -= 1


def check_request(body: bytes) -> None:
    """Refuse all but roles, text, base64 images and :data:`KEYS` (DataError)."""
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
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise DataError("a message's content is a text or a list of parts")
        images += sum(_check_part(part) for part in content)
    if images > MAX_IMAGES:
        raise DataError(f"the conversation has {images} images; at most {MAX_IMAGES} are taken")


def _check_part(part: object) -> int:
    """Check a message's part and return its number of images."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        if IMAGE_PLACEHOLDER in part["text"]:
            raise DataError(f"the text contains {IMAGE_PLACEHOLDER}, which stands for an image; take it out")
        return 0
    if not isinstance(part, dict) or kind != "image_url":
        raise DataError(f"a part of a message has type 'text' or 'image_url', not {kind!r}")
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma or "," in data:
        raise DataError("an image comes with the request: image_url is data:image/...;base64,...")
    try:
        raw = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise DataError(f"an image is not valid base64: {error}") from error
    open_image(io.BytesIO(raw), max_pixels=MAX_PIXELS, name="the image")
    return 1


async def _read(receive: Receive) -> bytes | None:
    """Return the body of a request; None when it is too large."""
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
    """Replay the body, then pass on later events (the client's leaving)."""
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
