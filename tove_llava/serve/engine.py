"""The engine of the chat: one model, conversations with pictures, answers as they are generated."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, TextIteratorStreamer

from tove_llava.analysis.routing import routing_map
from tove_llava.data import IMAGE_PLACEHOLDER, Turn
from tove_llava.errors import DataError
from tove_llava.serve.generation import Answerer
from tove_llava.tower import ToveVisionModel

Picture = Image.Image | str | Path


@dataclass(frozen=True)
class Message:
    """One turn of a chat. Pictures belong to user turns, in front of the text unless placeholders say where."""

    role: str  # "user" or "assistant"
    text: str
    images: Sequence[Picture] = ()


@dataclass(frozen=True)
class Routing:
    """How much of each expert the tokens of one image received (mean gate weights).

    ``grids`` has the weight of every token, as rows of the image's token grid.
    """

    means: dict[str, float]
    grids: dict[str, list[list[float]]] = field(repr=False)


class _Stop(StoppingCriteria):
    """Ends generation at the next token once the listener has gone."""

    def __init__(self, gone: threading.Event) -> None:
        self.gone = gone

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.gone.is_set(), device=input_ids.device, dtype=torch.bool)


class Engine:
    """Thread-safe streaming chat. Several threads may ask at once; answers are generated one after another.

    Args:
        answerer: the loaded model.
        name: how the model is called in the user interface, usually its folder.
    """

    def __init__(self, answerer: Answerer, name: str = "") -> None:
        self.answerer = answerer
        self.name = name
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None, dtype: str | None = None, **options: Any) -> "Engine":
        """Load a model folder; see :meth:`Answerer.load`, which has the options."""
        return cls(Answerer.load(folder, device, dtype, **options), name=str(folder))

    def stream(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Iterator[str]:
        """Pieces of the answer to the last message, as they come. Closing the iterator stops the generation.

        Everything about the input is checked before the first piece.

        Raises:
            DataError: no question, a bad picture, or a conversation that is too long.
        """
        prompt, images = self._prepare(messages)
        return self._stream(prompt, images, max_new_tokens, temperature, top_p)

    def answer(self, messages: Sequence[Message], **options: Any) -> str:
        """The whole answer; options as in :meth:`stream`."""
        return "".join(self.stream(messages, **options)).strip()

    def routing(self, image: Picture) -> Routing | None:
        """Gate weights of one image, or None for a model without experts."""
        pixels = self.answerer.pixels(image, upright=True)  # [3, S, S]
        if not isinstance(self.answerer.tower, ToveVisionModel):
            return None
        with self._lock:
            found = routing_map(self.answerer.tower, pixels)
        if found is None:
            return None
        grids = {name: found.weights[..., column].tolist() for column, name in enumerate(found.names)}
        return Routing(found.means, grids)

    def _prepare(self, messages: Sequence[Message]) -> tuple[list[int], list[torch.Tensor]]:
        """Prompt ids and the pixels of all pictures, in order."""
        if not messages or messages[-1].role != "user":
            raise DataError("the last message must be the user's")
        pictures = [image for message in messages for image in message.images]
        turns = [_turn(message) for message in messages]
        prompt = self.answerer.encode(turns, len(pictures))
        return prompt, [self.answerer.pixels(image, upright=True) for image in pictures]

    def _stream(
        self, prompt: list[int], images: list[torch.Tensor], max_new_tokens: int, temperature: float, top_p: float
    ) -> Iterator[str]:
        gone = threading.Event()
        streamer = TextIteratorStreamer(self.answerer.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def work() -> list[str]:
            features = self.answerer.features(torch.stack(images)) if images else []
            return self.answerer.generate(
                [prompt], features, max_new_tokens, temperature, top_p, streamer=streamer, stop=_Stop(gone)
            )

        with self._lock, ThreadPoolExecutor(max_workers=1) as pool:
            future = pool.submit(work)
            future.add_done_callback(lambda _: streamer.end())  # also when it fails: the loop below must end
            try:
                started = False
                for piece in streamer:
                    piece = piece if started else piece.lstrip()
                    started = started or bool(piece)
                    if piece:
                        yield piece
                future.result()  # raises what went wrong in the thread
            finally:
                gone.set()


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
