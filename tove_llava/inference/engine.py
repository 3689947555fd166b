"""The engine of the chat: one model answers many conversations at once."""

import random
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch
from PIL import Image

from tove_llava.checkpoints.hub import shown_name
from tove_llava.core.errors import DataError
from tove_llava.data import IMAGE_PLACEHOLDER, Turn
from tove_llava.data.templates.base import role_of
from tove_llava.inference.generation import Answerer
from tove_llava.inference.replies import Request, StopFilter, TextStream, Timing
from tove_llava.inference.rolling_batch import RollingBatch, SequentialBatch
from tove_llava.inference.routing_map import RoutingMap
from tove_llava.inference.sampling import Sampling
from tove_llava.inference.sequences import has_plain_cache
from tove_llava.inference.vision import Vision
from tove_llava.inference.worker import Worker

__all__ = ["AnyImage", "Engine", "Message", "Reply", "RoutingMap", "Sampling", "Timing"]

#: an image, its file, the file's content, or a tensor from :meth:`Engine.pixels`
AnyImage: TypeAlias = Image.Image | str | Path | bytes | torch.Tensor


@dataclass(frozen=True)
class Message:
    """A turn of a chat; images come before a text without placeholders."""

    role: str  # "user", "assistant" or "system"
    text: str
    images: Sequence[AnyImage] = ()

    def turn(self) -> Turn:
        """Return the turn for the template, with a placeholder for each image.

        Raises:
            DataError: an unknown role, an empty question, or images that the message cannot have.
        """
        role = role_of(self.role, "a message")
        if self.images and role != "user":
            raise DataError("only the user's messages can have images")
        if role == "user" and not self.text.strip():
            raise DataError("the question is empty; type one")
        placed = self.text.count(IMAGE_PLACEHOLDER)
        if placed == len(self.images):
            return Turn(role, self.text)
        if placed:
            raise DataError(
                f"the message says {IMAGE_PLACEHOLDER} {placed} times, but it has {len(self.images)} images; "
                "leave the placeholders out, or write as many as there are images"
            )
        return Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(self.images) + self.text)


class Reply:
    """An iterator over the pieces of an answer.

    It raises the answer's error where the next piece would be. When nobody reads the answer any more (cancelled,
    closed, or this object deleted), the answer leaves the batch at the next token.
    """

    def __init__(self, request: Request, engine: "Engine") -> None:
        self._request = request
        self._engine = engine  # kept alive until the answer has been read
        self._over = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        event = None if self._over else self._request.events.get()
        if isinstance(event, str):
            return event
        self._over = True
        raise StopIteration if event is None else event

    def text(self) -> str:
        """Wait for the rest of the answer and return it stripped."""
        return "".join(self).strip()

    @property
    def reasoning(self) -> str | None:
        """Return the think block that the answer began with, so far; None without one."""
        return self._request.stream.reasoning

    @property
    def position(self) -> int:
        """Return the position in the queue from 1; 0 after the start."""
        return self._engine.worker.position(self._request)

    @property
    def timing(self) -> Timing | None:
        """Return the times so far; None before work has started."""
        return self._request.timing

    def cancel(self) -> None:
        """End the answer. Any thread may call this, also after the end."""
        self._engine.worker.cancel(self._request)

    close = cancel

    def __enter__(self) -> "Reply":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.cancel()

    def __del__(self) -> None:
        # May run anywhere, also while the engine's lock is held, so it only sets a flag.
        self._request.cancelled = True


class Engine:
    """Answers many questions at a time with one model.

    Any thread may ask. Answers join and leave the batch between two tokens, and none depends on the others. Language
    models whose cache cannot be gathered (sliding windows) answer one question after another.

    Args:
        answerer: the loaded model. From the first question on it belongs to the engine.
        name: shown in the user interface, usually the model's folder.
        max_batch, max_waiting: answers at a time, and questions in the queue; more are refused.

    Attributes:
        experts: those that can be attached and detached, in the order of the gate's columns; none for plain CLIP.
        choose: checks names of experts and orders them; see :meth:`Vision.choose`.
    """

    def __init__(self, answerer: Answerer, name: str = "", *, max_batch: int = 16, max_waiting: int = 64) -> None:
        self.answerer = answerer
        self.name = name
        self._vision = Vision(answerer)
        self.experts, self.choose = self._vision.experts, self._vision.choose
        batch = (RollingBatch if has_plain_cache(answerer.model) else SequentialBatch)(answerer, self._vision.read)
        self.worker = Worker(batch, max_batch, max_waiting, self._vision.forget)
        self._end = weakref.finalize(self, self.worker.close, 0.0)

    @classmethod
    def load(
        cls, folder: str | Path, *args: Any, max_batch: int = 16, max_waiting: int = 64, **options: Any
    ) -> "Engine":
        """Load a model folder; :meth:`Answerer.load` has the other arguments (``device``, ``dtype``, ...)."""
        answerer = Answerer.load(folder, *args, **options)
        return cls(answerer, name=shown_name(folder), max_batch=max_batch, max_waiting=max_waiting)

    def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        system: str | None = None,
        experts: Collection[str] | None = None,
    ) -> Reply:
        """Check the last message and put it into the queue.

        Args:
            messages: the conversation, user and assistant in turn.
            system: replaces the template's own system prompt.
            experts: read the images with these; all by default.

        Raises:
            DataError: no question, a bad image, an unknown expert, or a conversation that is too long.
            BusyError: the queue is full, or the engine is closed.
        """
        self.worker.check_room()  # before images are decoded
        request = self.prepare(messages, sampling, system, experts)
        self.worker.submit(request)
        return Reply(request, self)

    def prepare(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        system: str | None = None,
        experts: Collection[str] | None = None,
    ) -> Request:
        """Convert a question to ids and pixels; arguments as in :meth:`ask`."""
        sampling, chosen = sampling or Sampling(), self.choose(experts)
        if not messages or messages[-1].role != "user":
            raise DataError("the last message must be the user's")
        images = [image for message in messages for image in message.images]
        turns = [message.turn() for message in messages]
        if system is not None:
            turns = [Turn("system", system), *turns]
        if turns[0].role == "system" and self.answerer.template.single_turn:
            raise DataError(f"the model's template {self.answerer.template.name!r} has no system prompt")
        prompt = self.answerer.encode(turns, len(images), self._vision.image_tokens(chosen) if images else None)
        return Request(
            prompt=prompt,
            decoding=sampling,
            longest=min(sampling.max_new_tokens, self.answerer.max_length - len(prompt)),
            draw=random.random if sampling.seed is None else random.Random(sampling.seed).random,
            stream=TextStream(self.answerer.tokenizer, stop=StopFilter(sampling.stop)),
            pixels=[self.pixels(image) for image in images],
            experts=chosen,
        )

    def pixels(self, image: AnyImage) -> torch.Tensor:
        """Decode an image, upright, for any number of questions.

        Raises:
            DataError: the file is missing, damaged, not an image, or too large.
        """
        return image if isinstance(image, torch.Tensor) else self.answerer.pixels(image, upright=True)

    def stream(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        **choices: Any,
    ) -> Reply:
        """Return the pieces of the answer; closing the iterator stops the generation.

        ``choices`` and errors as in :meth:`ask`; everything is checked before the first piece.
        """
        return self.ask(messages, Sampling(max_new_tokens, temperature, top_p), **choices)

    def answer(self, messages: Sequence[Message], **options: Any) -> str:
        """Return the whole answer; options as in :meth:`stream`."""
        return self.stream(messages, **options).text()

    def routing(self, image: AnyImage, experts: Collection[str] | None = None) -> RoutingMap | None:
        """Return the gate weights of one image, read with ``experts``.

        All experts by default. None for a model without experts or gate, and where all experts are detached.

        Raises:
            DataError: a bad image, or an unknown expert. BusyError: the engine is closed.
        """
        pixels, chosen = self.pixels(image), self.choose(experts)
        return self.worker.run(lambda: self._vision.routing(pixels, chosen))

    def close(self, patience: float = 10.0) -> None:
        """Refuse questions and return when the last answer has ended.

        Questions in the queue get a BusyError at once; answers that still run after ``patience`` seconds get one too.
        """
        self.worker.close(patience)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()
