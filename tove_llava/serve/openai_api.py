"""An OpenAI-compatible endpoint over the engine of chat and page."""

import asyncio
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import anyio
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from tove_llava.core.errors import BusyError, ConfigError, DataError, ToveError
from tove_llava.inference.engine import Engine
from tove_llava.inference.replies import Request as Question
from tove_llava.serve.chat_request import ChatRequest, RequestError
from tove_llava.serve.connections import Gate, Protocol, error_content

PORT = 8000
CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"
READING = 4  # requests that are read at a time: JSON, images, tokens
WAITING = 64  # requests that wait for this; more are refused
ENDING = 2.0  # seconds from a signal to the end, whatever hangs

logger = logging.getLogger(__name__)


class Endpoint:
    """The routes: one model, called by the name of its folder."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.model = Path(engine.name).absolute().name or "model"
        self._began = int(time.time())
        self._reading = anyio.CapacityLimiter(READING)

    def app(self) -> Gate:
        """Return the ASGI application."""
        app = FastAPI(title="ToVE-LLaVA", openapi_url=None, redirect_slashes=False)
        app.add_api_route(CHAT, self.chat, methods=["POST"], response_model=None)
        app.add_api_route(MODELS, self.models, methods=["GET"])
        app.add_api_route(MODELS + "/{name:path}", self.one_model, methods=["GET"])
        app.add_api_route(HEALTH, self.health, methods=["GET"])
        app.add_exception_handler(ToveError, _refused)
        app.add_exception_handler(HTTPException, _no_route)
        app.add_exception_handler(Exception, _failed)
        return Gate(app)

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self.one_model(self.model)]}

    async def one_model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return {"id": self.model, "object": "model", "created": self._began, "owned_by": "tove-llava"}

    async def chat(self, request: Request) -> Response:
        """Answer a chat, as a whole or in pieces."""
        if self._reading.statistics().tasks_waiting >= WAITING:
            raise BusyError(f"{WAITING} requests are waiting already; try again in a moment")
        self.engine.worker.check_room()
        body, events = await request.body(), _Events()
        asked, question = await anyio.to_thread.run_sync(self._prepare, body, limiter=self._reading)
        question.events = events
        pieces = self._pieces(question, events)
        first = await anext(pieces, "")  # before the status: the queue may be full, or the first step fail
        answer = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}
        if asked.stream:
            return StreamingResponse(_stream(asked, question, answer, first, pieces), media_type="text/event-stream")
        async with aclosing(pieces):
            text = first + "".join([piece async for piece in pieces])
        message = {"role": "assistant", "content": text, "refusal": None, **_reasoning(asked, question)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _ending(question)}
        return _json({**answer, "object": "chat.completion", "choices": [choice], "usage": _usage(question)})

    def _prepare(self, body: bytes) -> tuple[ChatRequest, Question]:
        asked = ChatRequest.read(body)
        self._check_model(asked.model)
        messages, sampling = asked.conversation(), asked.sampling(self.engine.answerer.max_length)
        try:
            return asked, self.engine.prepare(messages, sampling)
        except DataError as error:
            raise RequestError(str(error), "messages") from error

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise RequestError(
                f"there is no model {name!r} here; the one that is served is {self.model!r}",
                "model", "model_not_found", 404,
            )  # fmt: skip

    async def _pieces(self, question: Question, events: "_Events") -> AsyncGenerator[str, None]:
        """Queue a question and yield the text of its answer; closing ends the answer."""
        self.engine.worker.submit(question)
        try:
            while (event := await events.next()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.engine.worker.cancel(question)


class _Events(SimpleQueue):  # type: ignore[type-arg]
    """A queue that the engine's thread fills and the server's loop empties."""

    def __init__(self) -> None:
        self._loop, self._filled = asyncio.get_running_loop(), asyncio.Event()

    def put(self, event: Any, *args: Any) -> None:
        super().put(event)
        with suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self._filled.set)

    async def next(self) -> Any:
        while self.empty():
            self._filled.clear()
            await self._filled.wait()
        return self.get_nowait()


async def _stream(
    asked: ChatRequest, question: Question, answer: dict[str, Any], first: str, pieces: AsyncGenerator[str, None]
) -> AsyncIterator[str]:
    """Yield the server-sent events of an answer."""

    def chunk(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        content = {**answer, "object": "chat.completion.chunk", "choices": choices}
        return _event({**content, "usage": usage} if asked.stream_options.include_usage else content)

    def part(ending: str | None = None, **delta: Any) -> str:
        return chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": ending}])

    async with aclosing(pieces):
        yield part(role="assistant", content="")
        if first:
            yield part(content=first)
        try:
            async for piece in pieces:
                yield part(content=piece)
        except ToveError as error:
            yield _event(error_content(_status(error), str(error)))
            return
        yield part(_ending(question), **_reasoning(asked, question))
        if asked.stream_options.include_usage:
            yield chunk([], _usage(question))
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _json(content: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # ASCII, because a message may quote half of a surrogate pair.
    return Response(json.dumps(content), status, headers, "application/json")


def _ending(question: Question) -> str:
    return "length" if question.cut else "stop"


def _usage(question: Question) -> dict[str, int]:
    given, made = len(question.prompt), len(question.tokens)
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


def _reasoning(asked: ChatRequest, question: Question) -> dict[str, str]:
    reasoning = question.stream.reasoning if asked.include_reasoning else None
    return {} if reasoning is None else {"reasoning_content": reasoning}


def _status(error: Exception) -> int:
    if isinstance(error, DataError):
        return getattr(error, "status", 400)
    return 503 if isinstance(error, BusyError) else 500


def _refused(request: Request, error: Exception) -> Response:
    status = _status(error)
    content = error_content(status, str(error), getattr(error, "param", None), getattr(error, "code", None))
    return _json(content, status, {"Retry-After": "1"} if status == 503 else None)


def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    content = error_content(error.status_code, f"there is no {asked} here; use POST {CHAT} or GET {MODELS}")
    return _json(content, error.status_code, error.headers)


def _failed(request: Request, error: Exception) -> Response:
    return _json(error_content(500, "the request failed in the program; its log says where"), 500)


class Server(uvicorn.Server):
    """uvicorn's server, which ends the engine first and in time."""

    def __init__(self, engine: Engine, bound: socket.socket) -> None:
        self.endpoint, self._bound = Endpoint(engine), bound
        self._killer: threading.Timer | None = None
        bare: dict[str, Any] = {"ws": "none", "lifespan": "off", "proxy_headers": False, "server_header": False}
        app = self.endpoint.app()
        super().__init__(uvicorn.Config(app, http=Protocol, timeout_graceful_shutdown=1, log_level="error", **bare))

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        if self._killer is None:  # a step of a large model, or an image, may take longer
            self._killer = threading.Timer(ENDING, os._exit, (128 + sig,))
            self._killer.daemon = True
            self._killer.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Clients get the end of their answer or an error, so that the connections can close.
        threading.Thread(target=self.endpoint.engine.close, args=(0.5,), daemon=True).start()
        await super().shutdown(sockets)

    def serve_forever(self) -> None:
        """Answer until a signal or ``should_exit``."""
        self.run([self._bound])


def serve_openai(model: str | Path, host: str, port: int | None = None, **options: Any) -> None:
    """Serve a model folder, under the folder's name, until interrupted; options of ``Engine.load``.

    Raises:
        ConfigError: the address is taken.
        CheckpointError: the folder holds no model.
    """
    port = PORT if port is None else port
    with bind(host, port) as bound, Engine.load(model, **options) as engine:  # loading may take minutes
        server = Server(engine, bound)
        print(f"serving {server.endpoint.model} on http://{host}:{port}/v1; Ctrl-C ends it", flush=True)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises its signal again at its end
        server.serve_forever()


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address; clients are refused until a server listens.

    Raises:
        ConfigError: it is taken, or this machine has no such address.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ConfigError(f"the server cannot listen on {host}:{port}: {error}; choose --port") from error
    return bound
