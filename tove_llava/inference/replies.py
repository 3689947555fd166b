"""A question on its way: what the worker knows of it, and what its caller sees."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType

from torch import Tensor

from tove_llava.inference.pieces import Pieces
from tove_llava.inference.sampling import Sampling


@dataclass(frozen=True)
class Timing:
    """Where the time of an answer went, in seconds.

    Attributes:
        waited: in the queue.
        tower: in the vision tower, together with the pictures that were encoded in the same batch.
        first_token: from the start of work to the first token, the tower included; 0 until it is there.
        tokens: generated so far, the one that ends the answer included.
        tokens_per_second: of this answer, after its first token; 0 until there are two.
        images: pictures of the conversation.
    """

    waited: float
    tower: float
    first_token: float
    tokens: int
    tokens_per_second: float
    images: int


class Request:
    """A question within the engine. The worker alone changes it, but for ``cancelled``.

    Args:
        prompt: ids, each image token in place.
        pixels: [3, S, S] of each picture, in the order of their placeholders.
        experts: with which the tower reads them.
        longest: tokens after which the answer ends.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        pixels: Sequence[Tensor],
        experts: frozenset[str],
        sampling: Sampling,
        longest: int,
        pieces: Pieces,
    ) -> None:
        self.prompt = list(prompt)
        self.pixels = list(pixels)
        self.experts = experts
        self.sampling = sampling
        self.longest = longest
        self.tokens: list[int] = []
        self.cancelled = False
        self.ended = False
        self.tower = 0.0
        # Text, then one of: None (the end), an error.
        self.events: SimpleQueue[str | BaseException | None] = SimpleQueue()
        self._images = len(self.pixels)
        self._pieces = pieces
        self._asked = time.perf_counter()
        self._began = self._first = self._last = 0.0

    @property
    def live(self) -> bool:
        """Whether somebody waits for more of it."""
        return not (self.ended or self.cancelled)

    def begin(self) -> None:
        """Work starts; a second time after the memory was full."""
        self._began = self._began or time.perf_counter()

    def take(self, token: int, ends: Callable[[int], bool]) -> None:
        """The next token of the answer."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.tokens.append(token)
        self._say(self._pieces.add(token))
        if len(self.tokens) >= self.longest or ends(token):
            self.finish()

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing more comes, because of ``error`` if there is one."""
        if self.ended:
            return
        if error is None:
            self._say(self._pieces.end())
        self.ended = True
        self.pixels = []
        self.events.put(error)

    def _say(self, piece: str) -> None:
        if piece:
            self.events.put(piece)

    @property
    def timing(self) -> Timing | None:
        """None before work has started."""
        if not self._began:
            return None
        tokens, told = len(self.tokens), self._last - self._first
        return Timing(
            waited=self._began - self._asked,
            tower=self.tower,
            first_token=self._first - self._began if self._first else 0.0,
            tokens=tokens,
            tokens_per_second=(tokens - 1) / told if tokens > 1 and told > 0 else 0.0,
            images=self._images,
        )


class Reply:
    """An answer as it comes: an iterator over pieces of its text.

    An error of this answer is raised where its pieces would be. An answer that nobody reads any more (cancelled,
    closed, or this object gone) frees its place at the next token.
    """

    def __init__(self, request: Request, position: Callable[[Request], int], cancel: Callable[[Request], None]) -> None:
        self._request = request
        self._position = position
        self._cancel = cancel
        self._over = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._over:
            raise StopIteration
        event = self._request.events.get()
        if isinstance(event, str):
            return event
        self._over = True
        if event is not None:
            raise event
        raise StopIteration

    def text(self) -> str:
        """The rest of the answer, waited for; without white space around it."""
        return "".join(self).strip()

    @property
    def position(self) -> int:
        """Place in the queue, from 1; 0 once work on it has started."""
        return self._position(self._request)

    @property
    def timing(self) -> Timing | None:
        """Where the time went so far; None before work has started."""
        return self._request.timing

    def cancel(self) -> None:
        """Ends the answer; whoever reads it sees its end. Any thread may call it, also when it has ended."""
        self._cancel(self._request)

    close = cancel

    def __enter__(self) -> "Reply":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.cancel()

    def __del__(self) -> None:
        # May run anywhere, also while the engine's lock is held: no more than a flag.
        self._request.cancelled = True
