"""A question in the engine, and the text of its answer."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from tove_llava.inference.reasoning import ReasoningFilter, spoken
from tove_llava.inference.rolling_batch import Row

BROKEN = "\ufffd"  # what decoders write for bytes that are not (yet) a character


@dataclass
class StopFilter:
    """Ends a text before the first of some texts; ``found`` tells if one was there."""

    texts: Sequence[str] = ()
    found: bool = False
    _held: str = ""  # may be the beginning of a stop text

    def pass_on(self, piece: str, final: bool = False) -> str:
        """Return the text that certainly comes before a stop text."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [start for stop in self.texts if (start := text.find(stop)) >= 0]
        if starts:
            self.found = True
            return text[: min(starts)]
        beginnings = (stop[:length] for stop in self.texts for length in range(1, len(stop)))
        held = 0 if final else max((len(each) for each in beginnings if text.endswith(each)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


@dataclass
class TextStream:
    """Turns tokens into text as they come, only in whole characters.

    The text of a token depends on its neighbours, so each piece is the growth of the last few tokens' text. Joined, the
    pieces are the text of all tokens, without leading white space, without a think block, and up to a stop text.
    (``tokenizers.decoders.DecodeStream`` raises where LLaMA's byte tokens form no character, so it cannot serve drawn
    answers.)
    """

    tokenizer: Any
    _window: list[int] = field(default_factory=list)  # tokens whose text was returned, as context, and later ones
    _given: int = 0  # tokens of the window whose text was returned
    _started: bool = False
    _reasoning: ReasoningFilter = field(default_factory=ReasoningFilter)
    stop: StopFilter = field(default_factory=StopFilter)

    @property
    def reasoning(self) -> str | None:
        """Return the think block that the answer began with, so far; None without one."""
        return spoken(self._reasoning.whole).reasoning

    def add(self, tokens: Sequence[int], final: bool = False) -> str:
        """Return the answer's text that is now certain; with ``final``, all of it."""
        return self.stop.pass_on(self._reasoning.pass_on(self._certain(tokens, final), final), final)

    def _certain(self, tokens: Sequence[int], final: bool) -> str:
        self._window += tokens
        before, after = (
            str(self.tokenizer.decode(part, skip_special_tokens=True))
            for part in (self._window[: self._given], self._window)
        )
        if len(after) <= len(before) or (after.endswith(BROKEN) and not final):
            return ""
        self._window, self._given = self._window[self._given :], len(self._window) - self._given
        piece = after[len(before) :] if self._started else after[len(before) :].lstrip()
        self._started = self._started or bool(piece)
        return piece


@dataclass(frozen=True)
class Timing:
    """The stages of an answer, in seconds.

    Attributes:
        waited: in the queue.
        tower: in the vision tower, together with the images that were encoded in the same batch.
        first_token: from the start of work to the first token, the tower included; 0 until it is there.
        tokens: generated so far, the one that ends the answer included.
        tokens_per_second: of this answer, after its first token; 0 until there are two.
        images: images of the conversation.
    """

    waited: float
    tower: float
    first_token: float
    tokens: int
    tokens_per_second: float
    images: int


@dataclass(eq=False, kw_only=True)
class Request(Row):
    """A question in the engine; other threads set only ``cancelled``.

    Attributes:
        pixels: [3, S, S] of each image, in the order of their placeholders.
        experts: the tower reads the images with these.
        events: pieces of text, then an error or None, the end.
        tower: seconds that the vision tower took.
        began: time at which work started.
        cut: the answer ended only because it was the longest allowed.
    """

    stream: TextStream
    pixels: list[Tensor] = field(default_factory=list)
    experts: tuple[str, ...] = ()
    cancelled: bool = False
    tower: float = 0.0
    began: float = 0.0
    cut: bool = False
    events: "SimpleQueue[str | BaseException | None]" = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self._images = len(self.pixels)
        self._asked = time.perf_counter()
        self._first = self._last = 0.0

    @property
    def live(self) -> bool:
        """Tell if the caller still waits for text."""
        return not (self.ended or self.cancelled)

    def take(self, token: int, ends: Callable[[int], bool]) -> None:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.tokens.append(token)
        if piece := self.stream.add([token]):
            self.events.put(piece)
        ended = self.stream.stop.found or ends(token)
        if ended or len(self.tokens) >= self.longest:
            self.cut = not ended
            self.finish()

    def finish(self, error: BaseException | None = None) -> None:
        if self.ended:
            return
        if error is None and (piece := self.stream.add((), final=True)):
            self.events.put(piece)
        self.ended = True
        self.pixels = []
        self.events.put(error)

    @property
    def timing(self) -> Timing | None:
        """Return the times so far; None before work has started."""
        if not self.began:
            return None
        tokens, elapsed = len(self.tokens), self._last - self._first
        return Timing(
            waited=self.began - self._asked,
            tower=self.tower,
            first_token=self._first - self.began if self._first else 0.0,
            tokens=tokens,
            tokens_per_second=(tokens - 1) / elapsed if tokens > 1 and elapsed > 0 else 0.0,
            images=self._images,
        )
