"""From a conversation to its answer, as it grows, without holding a thread of the server."""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread

from tove_llava.inference.engine import Engine, Reply, Sampling, Timing
from tove_llava.serve.ui.conversation import Said, checked_text, messages

AT_ONCE = 64  # answers that the page asks of an engine at a time
DECODING = 4  # conversations whose pictures are decoded at a time: what they need of memory is bounded
LOOK = 0.25  # seconds between two looks at a question's place in the queue
PAUSE = 0.06  # seconds between two updates of an answer

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What a user sets for an answer. ``experts``: those that are attached, None for all."""

    sampling: Sampling
    system: str = ""
    experts: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls, system: str | None, temperature: float, top_p: float, tokens: float, experts: Sequence[str] | None
    ) -> "Settings":
        """From the values of the page's components.

        Raises:
            DataError: one is out of range.
        """
        system = checked_text(system or "", "system prompt").strip()
        return cls(Sampling(int(tokens), temperature, top_p), system, None if experts is None else tuple(experts))


@dataclass(frozen=True)
class Answer:
    """An answer so far. ``turn`` is what the page shows of it; ``timing`` comes with the end."""

    turn: Said
    timing: Timing | None = None


class Desk:
    """Asks an engine on behalf of many users at once. One for a page and an event loop."""

    def __init__(self) -> None:
        self._reading = anyio.CapacityLimiter(4 * AT_ONCE)
        self._decoding = anyio.CapacityLimiter(DECODING)

    async def guarded(self, work: "partial[T]") -> T:
        """Work that decodes pictures, in a thread."""
        return await anyio.to_thread.run_sync(work, limiter=self._decoding)

    async def ask(
        self,
        engine: Engine,
        said: Sequence[Said],
        settings: Settings,
        begun: Callable[[Reply], None] = lambda reply: None,
    ) -> AsyncGenerator[Answer, None]:
        """The answer to a conversation. Closing the iterator (``aclosing``) frees its place in the engine.

        Args:
            begun: is given the reply; who cancels it ends the answer with what it has.

        Raises:
            ToveError: as of ``Engine.ask`` and ``conversation.messages``.
        """
        reply = await self.guarded(partial(_ask, engine, said, settings))
        try:
            begun(reply)
            while place := reply.position:
                yield Answer(Said("assistant", "", note=f"waiting, number {place} in the queue"))
                await anyio.sleep(LOOK)
            text, told = "", 0.0
            while (piece := await self._next(reply)) is not None:
                text = (text + piece).lstrip()
                if text and time.monotonic() - told >= PAUSE:
                    yield Answer(Said("assistant", text))
                    told = time.monotonic()
            count = len(engine.experts if settings.experts is None else settings.experts) if engine.experts else None
            text, timing = text.strip(), reply.timing
            notes = ["" if text else "an empty answer", "" if timing is None else timing_line(timing, count)]
            yield Answer(Said("assistant", text, note=" · ".join(filter(None, notes))), timing)
        finally:
            reply.cancel()

    async def _next(self, reply: Reply) -> str | None:
        # Whoever leaves leaves the thread too: cancel() wakes it up.
        return await anyio.to_thread.run_sync(next, reply, None, limiter=self._reading, abandon_on_cancel=True)


def timing_line(timing: Timing, experts: int | None) -> str:
    """Time by stage, in words; without the tower where there was no picture."""
    parts = [f"waited {timing.waited:.1f} s"] if timing.waited >= 0.1 else []
    if timing.images:
        parts.append(f"tower {1000 * timing.tower:.0f} ms")
    parts.append(f"first token {1000 * timing.first_token:.0f} ms")
    if timing.tokens_per_second:
        parts.append(f"{timing.tokens_per_second:.0f} tokens/s")
    if experts is not None and timing.images:
        parts.append("no experts" if experts == 0 else "1 expert" if experts == 1 else f"{experts} experts")
    return " · ".join(parts)


def _ask(engine: Engine, said: Sequence[Said], settings: Settings) -> Reply:
    return engine.ask(messages(said), settings.sampling, system=settings.system or None, experts=settings.experts)
