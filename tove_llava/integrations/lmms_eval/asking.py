"""Answers to an evaluation harness, independent of the harness's own classes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import IMAGE_PLACEHOLDER, Turn
from tove_llava.eval.tasks import Decoding
from tove_llava.inference.generation import Answerer
from tove_llava.inference.sequences import as_images

DEFAULT_MAX_NEW_TOKENS = 1024

# Generation settings that say nothing beyond the others, or that other models need.
_IGNORED = ("do_sample", "image_aspect_ratio", "image_sizes", "use_cache")


@dataclass(frozen=True)
class Request:
    """A conversation that waits for an answer.

    Attributes:
        turns: system, user and assistant messages; the last is the user's.
        images: in the order of their placeholders.
        settings: generation settings in transformers' names, and ``until``: texts at which the answer is cut.
    """

    turns: Sequence[Turn]
    images: Sequence[Image.Image | str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def user_turn(text: str, images: int) -> Turn:
    """Return the user's turn; missing placeholders of images go in front."""
    if text.count(IMAGE_PLACEHOLDER) == images:
        return Turn("user", text)
    return Turn("user", f"{IMAGE_PLACEHOLDER}\n" * images + text.replace(IMAGE_PLACEHOLDER, "").strip())


def decoding_of(settings: Mapping[str, Any]) -> Decoding:
    """Read the decoding from settings. ``do_sample: false`` is greedy at any temperature.

    Raises:
        ConfigError: a setting is unknown or out of its range.
    """
    rest = {key: value for key, value in settings.items() if key not in (*_IGNORED, "until") and value is not None}
    known = {key: rest.pop(key) for key in Decoding.__dataclass_fields__ if key in rest}
    if rest:
        raise ConfigError(f"generation settings that this model has no use for: {', '.join(sorted(rest))}")
    if settings.get("do_sample") is True:
        known.setdefault("temperature", 1.0)  # as in transformers
    if settings.get("do_sample") is False or not known.get("temperature"):
        known |= {"temperature": 0.0, "top_p": 1.0}  # tasks give these any value with greedy decoding
    return Decoding(**{"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **known})


def cut(text: str, until: Sequence[str] | str | None) -> str:
    """Return the text before the first of the stop texts."""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.split(stop)[0]
    return text


def answer(
    answerer: Answerer,
    requests: Sequence[Request],
    batch_size: int = 1,
    done: Callable[[int], Any] = lambda number: None,
) -> list[str]:
    """Answer requests in order; equal settings share the model's batches.

    Args:
        done: called with the number of further answers.

    Raises:
        ConfigError, DataError: a request cannot be answered; its number is named.
    """
    prompts: list[list[int]] = []
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        try:
            prompts.append(answerer.encode(request.turns, len(request.images)))
        except DataError as error:
            raise DataError(f"request {number}: {error}") from error
        groups.setdefault(json.dumps(dict(request.settings), sort_keys=True, default=str), []).append(number)
    answers = [""] * len(requests)
    for numbers in groups.values():
        decoding = decoding_of(requests[numbers[0]].settings)
        numbers.sort(key=lambda number: -len(prompts[number]))  # the longest first: memory runs out at once or never
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            texts = answerer.generate(
                [prompts[number] for number in batch],
                _features(answerer, [image for number in batch for image in requests[number].images]),
                decoding.max_new_tokens,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                num_beams=decoding.num_beams,
                min_new_tokens=decoding.min_new_tokens,
            )
            for number, text in zip(batch, texts, strict=True):
                answers[number] = cut(text, requests[number].settings.get("until"))
            done(len(batch))
    return answers


@torch.inference_mode()
def loss(answerer: Answerer, request: Request, words: str) -> tuple[float, bool]:
    """Return the mean negative log-probability (nats) of the tokens of an answer.

    Returns:
        the mean, and True if greedy decoding would begin with these tokens.

    Raises:
        DataError: there are no words.
    """
    target_ids = answerer.answer_ids(words.strip())
    if not target_ids:
        raise DataError("an answer without words has no probability")
    prompt = answerer.encode(request.turns, len(request.images))
    ids = torch.tensor([prompt + target_ids[:-1]], device=answerer.device)  # [1, L]
    features = _features(answerer, request.images)
    output = answerer.model(input_ids=ids, logits_to_keep=len(target_ids), **as_images(features))
    logits = output.logits[0]  # [words, V]
    targets = torch.tensor(target_ids, device=answerer.device)  # [words]
    logs = logits.float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    return -float(logs.mean()), bool((logits.argmax(dim=-1) == targets).all())


def _features(answerer: Answerer, images: Sequence[Image.Image | str]) -> list[torch.Tensor]:
    """Return [N, D] of every image."""
    if not images:
        return []
    return answerer.features(torch.stack([answerer.pixels(image) for image in images]))
