"""The page's way to an engine, without holding a server thread."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from PIL import Image
from torch import Tensor

from tove_llava.core.errors import DataError
from tove_llava.data.images import naming, open_image
from tove_llava.inference.engine import Engine, Reply, Sampling, Timing
from tove_llava.serve.ui.conversation import Message, checked_text

AT_ONCE = 64  # answers that the page asks of an engine at a time
DECODING = 4  # images that are decoded at a time: this bounds the memory that they need
KEPT = 32  # images of all conversations that are kept as the model sees them
MAX_IMAGES = 8  # of one question
MAX_PIXELS = 40_000_000  # decoded, an image of this size takes 120 MB
SIDE = 480  # pixels of a drawing's side
POLL = 0.25  # seconds between two looks at a question's position in the queue
PAUSE = 0.06  # seconds between two updates of an answer

T = TypeVar("T")


@dataclass(frozen=True)
class SeenImage:
    """An image as the model sees it."""

    pixels: Tensor  # [3, S, S], for the engine
    framed: Image.Image  # the same square, RGB, SIDE x SIDE


@dataclass(frozen=True)
class Settings:
    """The user's settings of an answer; ``experts`` None means all."""

    sampling: Sampling
    system: str = ""
    experts: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        engine: Engine,
        system: str | None,
        temperature: float,
        top_p: float,
        tokens: float,
        experts: Sequence[str] | None,
    ) -> "Settings":
        """Read the values of the page's components.

        Raises:
            DataError: one is out of range.
        """
        system = checked_text(system or "", "system prompt").strip()
        attached = None if experts is None or not engine.experts else tuple(experts)
        return cls(Sampling(int(tokens), temperature, top_p), system, attached)


@dataclass(frozen=True)
class Answer:
    """An answer so far; ``message`` is shown, ``timing`` comes last."""

    message: Message
    timing: Timing | None = None


class Session:
    """Asks engines for all visitors of one page in one event loop."""

    def __init__(self) -> None:
        self._reading = anyio.CapacityLimiter(4 * AT_ONCE)
        self._decoding = anyio.CapacityLimiter(DECODING)
        # Gradio names an upload's folder by the file's content, so a name always means the same image.
        self._seen = lru_cache(KEPT)(_read)
        self._locks = [Lock() for _ in range(DECODING)]

    def see(self, engine: Engine, file: str) -> SeenImage:
        """Read an image file, each only once while it is kept.

        Raises:
            DataError: it is no image, damaged, or has too many pixels. The message names the file without its folder.
        """
        with self._locks[hash(file) % DECODING]:
            return self._seen(engine, file)

    def question(self, engine: Engine, message: Mapping[str, Any]) -> Message:
        """Read gradio's text box (``{"text": str, "files": [path]}``) and its images.

        Raises:
            DataError: nothing is asked, the text is too long, or an image is refused.
        """
        text = checked_text(str(message.get("text") or ""), "question")
        files = tuple(str(file) for file in message.get("files") or [])
        if not text.strip():
            raise DataError("the question is empty; type one")
        if len(files) > MAX_IMAGES:
            raise DataError(f"{len(files)} images with one question; at most {MAX_IMAGES} are taken")
        for file in files:
            self.see(engine, file)
        return Message("user", text, files)

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Do work that decodes images in a thread."""
        return await anyio.to_thread.run_sync(partial(work, *args), limiter=self._decoding)

    async def ask(
        self,
        engine: Engine,
        messages: Sequence[Message],
        settings: Settings,
        begun: Callable[[Reply], None] = lambda reply: None,
    ) -> AsyncGenerator[Answer, None]:
        """Answer a conversation; closing the iterator (``aclosing``) frees the engine.

        Args:
            begun: receives the reply; cancelling that ends the answer with its text so far.

        Raises:
            ToveError: as of ``Engine.ask`` and :meth:`see`.
        """
        reply = await self.in_thread(self._ask, engine, messages, settings)
        try:
            begun(reply)
            while position := reply.position:
                yield Answer(Message("assistant", "", note=f"waiting, number {position} in the queue"))
                await anyio.sleep(POLL)
            text, shown = "", 0.0
            while True:
                # Abandoned when the visitor leaves: cancel() then wakes the thread up.
                piece = await anyio.to_thread.run_sync(next, reply, None, limiter=self._reading, abandon_on_cancel=True)
                if piece is None:
                    break
                text = (text + piece).lstrip()
                if text and time.monotonic() - shown >= PAUSE:
                    yield Answer(Message("assistant", text))
                    shown = time.monotonic()
            experts = engine.experts if settings.experts is None else settings.experts
            text, timing = text.strip(), reply.timing
            notes = [] if text else ["an empty answer"]
            if timing is not None:
                notes.append(timing_line(timing, len(experts) if engine.experts else None))
            yield Answer(Message("assistant", text, note=" · ".join(notes)), timing)
        finally:
            reply.cancel()

    def _ask(self, engine: Engine, messages: Sequence[Message], settings: Settings) -> Reply:
        seen = [replace(each, images=[self.see(engine, str(file)).pixels for file in each.images]) for each in messages]
        return engine.ask(seen, settings.sampling, system=settings.system or None, experts=settings.experts)


def _read(engine: Engine, file: str) -> SeenImage:
    image = open_image(file, max_pixels=MAX_PIXELS, name=Path(file).name)
    with naming(Path(file).name):
        framed = engine.answerer.upright_transform.framed(image)
        return SeenImage(engine.pixels(image), framed.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def timing_line(timing: Timing, experts: int | None) -> str:
    """Describe the time of each stage; the tower's only with an image."""
    parts = [f"waited {timing.waited:.1f} s"] if timing.waited >= 0.1 else []
    if timing.images:
        parts.append(f"tower {1000 * timing.tower:.0f} ms")
    parts.append(f"first token {1000 * timing.first_token:.0f} ms")
    if timing.tokens_per_second:
        parts.append(f"{timing.tokens_per_second:.0f} tokens/s")
    if experts is not None and timing.images:
        parts.append({0: "no experts", 1: "1 expert"}.get(experts, f"{experts} experts"))
    return " · ".join(parts)
