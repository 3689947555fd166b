"""From prompts to sequences that wait for their answer; what prompts share is computed once.

A prompt is ``head + image + tail``: the head (the system's text) is the same for all questions, the image for all
questions about one picture. ``B`` prompts, ``N`` tokens an image, ``D`` the language model's width, ``V`` words.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tove_llava.inference.generation import Answerer
from tove_llava.inference.sequences import GROWTH, Sequences
from tove_llava.tower import ToveVisionOutput


@dataclass(frozen=True)
class Prompt:
    """Ids of a prompt with its images.

    Attributes:
        ids: from :meth:`Answerer.encode`, each image token in place.
        picture: equal for prompts about the same picture; None without one.
        features: [N, D], what the language model reads of the picture; None without one. A list of them, in the order
            of their placeholders, for a prompt with any number of pictures, which shares nothing.
    """

    ids: Sequence[int]
    picture: Hashable = None
    features: Tensor | Sequence[Tensor] | None = None

    @property
    def images(self) -> list[Tensor]:
        """The features of all its pictures."""
        if self.features is None:
            return []
        return [self.features] if isinstance(self.features, Tensor) else list(self.features)


class Prefill:
    """Starts sequences.

    Args:
        share: compute head and image once; otherwise every prompt as a whole, for comparison.
    """

    def __init__(self, answerer: Answerer, share: bool = True) -> None:
        self.answerer = answerer
        self.model = answerer.model
        self.layers: int = answerer.model.config.get_text_config().num_hidden_layers
        self.share = share
        self._heads: dict[tuple[int, ...], Sequences] = {}

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt]) -> tuple[Sequences, Tensor]:
        """The prompts' sequences, in order, and float32 [B, V] logits of the token that follows each."""
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(self._shared(prompt), []).append(place)
        started = [
            self._start([prompts[place] for place in places], head, image) for (head, image), places in groups.items()
        ]
        if len(started) == 1:
            return started[0]
        order = [place for places in groups.values() for place in places]
        back = [order.index(place) for place in range(len(prompts))]
        joined = Sequences.gather([(sequences, range(len(sequences))) for sequences, _ in started], room=0)
        logits = torch.cat([logits for _, logits in started])
        return Sequences.gather([(joined, back)]), logits[back]

    def _shared(self, prompt: Prompt) -> tuple[tuple[int, ...], int]:
        """The head's ids and the number of image tokens after it; nothing where nothing is shared."""
        one = isinstance(prompt.features, Tensor)
        if not one or not self.share or prompt.ids[-1] == self.answerer.image_token_id:
            return (), 0
        start = list(prompt.ids).index(self.answerer.image_token_id)
        return tuple(prompt.ids[:start]), len(prompt.images[0])

    def _start(self, prompts: Sequence[Prompt], head: tuple[int, ...], image: int) -> tuple[Sequences, Tensor]:
        tails = [prompt.ids[len(head) + image :] for prompt in prompts]
        ids, valid = pad_left(tails, self.answerer.pad_id, self.answerer.device)  # [B, L]
        room = ids.shape[1] + GROWTH
        if not image:
            features = [image for prompt in prompts for image in prompt.images]
            sequences = Sequences(len(prompts), self.layers, self.answerer.device)
            return sequences, sequences.extend(self.model, ids, valid, as_images(features))[:, -1]
        pictures = {prompt.picture: prompt.images[0] for prompt in prompts}
        alone = len(pictures) == len(prompts)
        sequences = Sequences.gather([(self._head(head), [0] * len(pictures))], room=image + (room if alone else 0))
        tokens = torch.full((len(pictures), image), self.answerer.image_token_id, device=self.answerer.device)
        sequences.extend(self.model, tokens, images=as_images(list(pictures.values())))
        if not alone:
            numbers = {picture: row for row, picture in enumerate(pictures)}
            sequences = Sequences.gather([(sequences, [numbers[prompt.picture] for prompt in prompts])], room=room)
        return sequences, sequences.extend(self.model, ids, valid)[:, -1]

    def _head(self, ids: tuple[int, ...]) -> Sequences:
        """The sequence of a head, one row."""
        if ids not in self._heads:
            head = Sequences(1, self.layers, self.answerer.device)
            if ids:
                head.extend(self.model, torch.tensor([ids], device=self.answerer.device))
            self._heads = {ids: head}  # one at a time: a run has one template
        return self._heads[ids]


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[B, L] ids and [B, L] ones for tokens, zeros for padding."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    valid = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row, dtype=torch.long)
        valid[index, longest - len(row) :] = 1
    return ids.to(device), valid.to(device)


def as_images(features: Sequence[Tensor]) -> dict[str, Any] | None:
    """The model's ``mm_encoder_outputs`` for images [N, D], in the order of their placeholders."""
    return {"image": ToveVisionOutput(pooler_output=list(features))} if features else None
