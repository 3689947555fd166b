"""Bound what a client can hold: connections, bodies, and answers that nobody waits for."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_BODY = 64 * 2**20  # bytes
SMALL_BODY = 2**20  # always read, whatever is held
MAX_HELD = 8 * MAX_BODY  # bytes of all requests together
PATIENCE = 10.0  # seconds: for the headers, for the body to begin, and without progress in either direction
RATE = 100_000  # bytes a second that a body has to come with after that

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class _Gone(Exception):
    """The client has closed the connection."""


class Gate:
    """An ASGI application that reads a body before ``app`` runs, and cancels it when the client has gone."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self._answer(scope, receive, send)
        except asyncio.CancelledError:
            with suppress(RuntimeError):  # the answer has begun
                await refuse(send, 503, "the server ends")

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        body = bytearray()
        try:
            try:
                refusal = await self._read(scope, receive, body)
            except _Gone:
                return
            except asyncio.TimeoutError:
                refusal = 408, "the request's body came too slowly; send it again"
            if refusal is not None:
                await refuse(send, *refusal)
                return
            await _until_gone(self.app, scope, bytes(body), receive, send)
        finally:
            self._held -= len(body)

    async def _read(self, scope: Mapping[str, Any], receive: Receive, body: bytearray) -> tuple[int, str] | None:
        """Fill ``body``; return status and reason of a refusal."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + PATIENCE
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = 413, f"the request is larger than {MAX_BODY // 2**20} MB; send smaller images"
        if declared.isdigit() and int(declared) > MAX_BODY:
            return too_large
        while True:
            event = await asyncio.wait_for(receive(), deadline - clock())
            if event["type"] == "http.disconnect":
                raise _Gone
            part = event.get("body", b"")
            body += part
            self._held += len(part)
            deadline += len(part) / RATE
            if len(body) > MAX_BODY:
                return too_large
            if len(body) > SMALL_BODY and self._held > MAX_HELD:
                return 503, "too many large requests at a time; try again in a moment"
            if not event.get("more_body"):
                return None


async def _until_gone(app: App, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send) -> None:
    """Run ``app`` on a body that was read; cancel it when the client leaves."""
    events: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Event:
        if events:
            return events.pop()
        return await asyncio.get_running_loop().create_future()  # this function's caller hears of the leaving

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = answer, left = asyncio.ensure_future(app(scope, replay, send)), asyncio.ensure_future(leave())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    if not answer.cancelled():
        answer.result()


async def refuse(send: Send, status: int, message: str) -> None:
    """Send an error in OpenAI's form and close the connection."""
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    body = json.dumps(error_content(status, message)).encode()
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_content(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Protocol(H11Protocol):
    """uvicorn's HTTP connection, closed when its headers do not come or its answer is not read."""

    _headers: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._headers, self._reading):
            if timer is not None:
                timer.cancel()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state is h11.IDLE:
            body = json.dumps(error_content(400, msg)).encode()
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def _await_headers(self) -> None:
        if self._headers is not None:
            self._headers.cancel()
        self._headers = self.loop.call_later(PATIENCE, self._close_without_headers)

    def _close_without_headers(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self.transport.abort()
