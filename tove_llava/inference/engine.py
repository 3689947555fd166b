"""The engine of the chat: one model, conversations with pictures, many answers at a time."""

import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image

from tove_llava.core.errors import DataError
from tove_llava.data import IMAGE_PLACEHOLDER, Turn
from tove_llava.inference.generation import Answerer
from tove_llava.inference.pieces import Pieces
from tove_llava.inference.replies import Reply, Request, Timing
from tove_llava.inference.rolling_batch import make_batch
from tove_llava.inference.routing import RoutingMap
from tove_llava.inference.sampling import Sampling
from tove_llava.inference.vision import Vision
from tove_llava.inference.worker import Worker

__all__ = ["Engine", "Message", "Picture", "Reply", "Routing", "Sampling", "Timing"]

Picture = Image.Image | str | Path


@dataclass(frozen=True)
class Message:
    """One turn of a chat. Pictures belong to user turns, in front of the text unless placeholders say where."""

    role: str  # "user" or "assistant"
    text: str
    images: Sequence[Picture] = ()


@dataclass(frozen=True)
class Routing:
    """How much of each expert the tokens of one image received.

    Attributes:
        means: mean gate weight of each expert; 0 for one that is detached.
        chosen: share of the tokens for which it has the largest weight.
        grids: the weight of every token, as rows of the image's token grid.
        argmax: the name of the expert with the largest weight, for every token.
    """

    means: dict[str, float]
    chosen: dict[str, float]
    grids: dict[str, list[list[float]]] = field(repr=False)
    argmax: list[list[str]] = field(repr=False)

    @classmethod
    def of(cls, found: RoutingMap) -> "Routing":
        """A routing map in plain numbers."""
        grids = {name: found.weights[..., column].tolist() for column, name in enumerate(found.names)}
        argmax = [[found.names[column] for column in row] for row in found.argmax.tolist()]
        return cls(found.means, found.chosen, grids, argmax)


class Engine:
    """Answers many questions at a time with one model. Any thread may ask.

    Questions wait in a bounded queue. Up to ``max_batch`` answers are generated together, a token of each at a time;
    whoever comes joins between two tokens, and whoever has ended or gone leaves. An answer is what it would be alone.
    Language models whose cache cannot be put together anew (sliding windows) answer one after another.

    Args:
        answerer: the loaded model. From the first question on it belongs to the engine.
        name: how the model is called in the user interface, usually its folder.
        max_batch: answers at a time.
        max_waiting: questions in the queue; more are refused.

    Attributes:
        experts: those that can be attached and detached, in the order of the gate's columns; none for CLIP alone.
    """

    def __init__(self, answerer: Answerer, name: str = "", *, max_batch: int = 16, max_waiting: int = 64) -> None:
        self.answerer = answerer
        self.name = name
        self._vision = Vision(answerer)
        self.experts: tuple[str, ...] = self._vision.experts
        self._worker = Worker(make_batch(answerer, self._vision), max_batch, max_waiting)
        self._end = weakref.finalize(self, self._worker.close, 0.0)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | None = None,
        dtype: str | None = None,
        *,
        max_batch: int = 16,
        max_waiting: int = 64,
        **options: Any,
    ) -> "Engine":
        """Load a model folder; see :meth:`Answerer.load`, which has the options."""
        answerer = Answerer.load(folder, device, dtype, **options)
        return cls(answerer, name=str(folder), max_batch=max_batch, max_waiting=max_waiting)

    def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        system: str | None = None,
        experts: Collection[str] | None = None,
    ) -> Reply:
        """Ask the last message. Everything is checked before the question is put into the queue.

        Args:
            messages: the conversation, user and assistant in turn.
            system: text in the place of the template's own system prompt.
            experts: with which the pictures are read; all by default.

        Raises:
            DataError: no question, a bad picture, an unknown expert, or a conversation that is too long.
            BusyError: the queue is full, or the engine is closed.
        """
        self._worker.check_room()  # before pictures are decoded
        sampling = sampling or Sampling()
        chosen = self._vision.chosen(experts)
        prompt, pixels = self._prepare(messages, system, chosen)
        longest = min(sampling.max_new_tokens, self.answerer.max_length - len(prompt))
        request = Request(prompt, pixels, chosen, sampling, longest, Pieces(self.answerer.tokenizer))
        self._worker.submit(request)
        return Reply(request, self._position, self._cancel)

    def stream(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        **choices: Any,
    ) -> Iterator[str]:
        """Pieces of the answer to the last message, as they come. Closing the iterator stops the generation.

        ``choices`` and errors as in :meth:`ask`; everything is checked before the first piece.
        """
        return _pieces(self.ask(messages, Sampling(max_new_tokens, temperature, top_p), **choices))

    def answer(self, messages: Sequence[Message], **options: Any) -> str:
        """The whole answer; options as in :meth:`stream`."""
        return "".join(self.stream(messages, **options)).strip()

    def routing(self, image: Picture, experts: Collection[str] | None = None) -> Routing | None:
        """Gate weights of one image, read with ``experts`` (all by default).

        None for a model without experts or without a gate, and where all are detached.

        Raises:
            DataError: a bad picture, or an unknown expert. BusyError: the engine is closed.
        """
        found = self.routing_map(image, experts)
        return None if found is None else Routing.of(found)

    def routing_map(self, image: Picture, experts: Collection[str] | None = None) -> RoutingMap | None:
        """As :meth:`routing`, in tensors."""
        vision = self._vision
        pixels, chosen = self.answerer.pixels(image, upright=True), vision.chosen(experts)
        return self._worker.run(lambda: vision.routing(pixels, chosen))

    @property
    def waiting(self) -> int:
        """Questions in the queue."""
        return self._worker.waiting

    @property
    def running(self) -> int:
        """Answers in the making."""
        return self._worker.running

    def close(self, patience: float = 10.0) -> None:
        """Take no more questions and return when the last answer has ended.

        Questions in the queue get a BusyError at once, and answers that still run after ``patience`` seconds too.
        """
        self._worker.close(patience)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    # A reply keeps the engine alive by these.
    def _position(self, request: Request) -> int:
        return self._worker.position(request)

    def _cancel(self, request: Request) -> None:
        self._worker.cancel(request)

    def _prepare(
        self, messages: Sequence[Message], system: str | None = None, experts: frozenset[str] | None = None
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Prompt ids and the pixels of all pictures, in order."""
        if not messages or messages[-1].role != "user":
            raise DataError("the last message must be the user's")
        pictures = [image for message in messages for image in message.images]
        turns = [_turn(message) for message in messages]
        if system is not None:
            if self.answerer.template.single_turn:
                raise DataError(f"the model's template {self.answerer.template.name!r} has no system prompt")
            turns.insert(0, Turn("system", system))
        tokens = self._vision.image_tokens(self._vision.chosen(experts)) if pictures else None
        prompt = self.answerer.encode(turns, len(pictures), tokens)
        return prompt, [self.answerer.pixels(image, upright=True) for image in pictures]


def _pieces(reply: Reply) -> Iterator[str]:
    with reply:
        yield from reply


def _turn(message: Message) -> Turn:
    """A turn as the template wants it: a placeholder for each image in front, unless the text has them."""
    if message.role not in ("user", "assistant"):
        raise DataError(f"a message's role must be user or assistant, not {message.role!r}")
    if message.images and message.role != "user":
        raise DataError("only the user's messages can have images")
    placed = message.text.count(IMAGE_PLACEHOLDER)
    if message.role == "user" and not message.text.strip():
        raise DataError("the question is empty; type one")
    if placed == len(message.images):
        return Turn("user" if message.role == "user" else "assistant", message.text)
    if placed:
        raise DataError(
            f"the message says {IMAGE_PLACEHOLDER} {placed} times, but it has {len(message.images)} images; "
            "leave the placeholders out, or write as many as there are images"
        )
    return Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(message.images) + message.text)
