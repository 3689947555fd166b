"""From prompts to sequences; common parts of prompts are computed once.

A prompt is ``head + image + tail``: all questions have the same head (the system's text), and all questions about one
image the same image. ``B`` prompts, ``N`` tokens an image, ``D`` the language model's width, ``V`` words.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tove_llava.inference.generation import Answerer
from tove_llava.inference.sequences import GROWTH, Sequences, pad_left


@dataclass(frozen=True)
class Prompt:
    """The ids of a prompt, with its images.

    Attributes:
        ids: from :meth:`Answerer.encode`, each image token in place.
        image: equal for prompts about the same image; None without one.
        features: [N, D] of its images, in the order of their placeholders. A prompt with several shares nothing.
    """

    ids: Sequence[int]
    image: Hashable = None
    features: Sequence[Tensor] = ()


class Prefill:
    """Starts sequences; with ``share``, computes head and image only once."""

    def __init__(self, answerer: Answerer, share: bool = True) -> None:
        self.answerer = answerer
        self.model = answerer.model
        self.layers: int = answerer.model.config.get_text_config().num_hidden_layers
        self.share = share
        self._heads: dict[tuple[int, ...], Sequences] = {}

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt]) -> tuple[Sequences, Tensor]:
        """Return the sequences and the next tokens' logits, float32 [B, V]."""
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(self._shared(prompt), []).append(index)
        started = [
            self._start([prompts[index] for index in members], head, image) for (head, image), members in groups.items()
        ]
        if len(started) == 1:
            return started[0]
        order = [index for members in groups.values() for index in members]
        back = [order.index(index) for index in range(len(prompts))]
        joined = Sequences.gather([(sequences, range(len(sequences))) for sequences, _ in started], room=0)
        logits = torch.cat([logits for _, logits in started])
        return Sequences.gather([(joined, back)]), logits[back]

    def _shared(self, prompt: Prompt) -> tuple[tuple[int, ...], int]:
        """Return the head's ids and the number of shared image tokens."""
        if not self.share or len(prompt.features) != 1 or prompt.ids[-1] == self.answerer.image_token_id:
            return (), 0
        start = list(prompt.ids).index(self.answerer.image_token_id)
        return tuple(prompt.ids[:start]), len(prompt.features[0])

    def _start(self, prompts: Sequence[Prompt], head: tuple[int, ...], image: int) -> tuple[Sequences, Tensor]:
        tails = [prompt.ids[len(head) + image :] for prompt in prompts]
        ids, valid = pad_left(tails, self.answerer.pad_id, self.answerer.device)  # [B, L]
        room = ids.shape[1] + GROWTH
        if not image:
            features = [each for prompt in prompts for each in prompt.features]
            sequences = Sequences(len(prompts), self.layers, self.answerer.device)
            return sequences, sequences.extend(self.model, ids, valid, features)[:, -1]
        images = {prompt.image: prompt.features[0] for prompt in prompts}
        distinct = len(images) == len(prompts)
        sequences = Sequences.gather([(self._head(head), [0] * len(images))], room=image + (room if distinct else 0))
        tokens = torch.full((len(images), image), self.answerer.image_token_id, device=self.answerer.device)
        sequences.extend(self.model, tokens, images=list(images.values()))
        if not distinct:
            numbers = {each: row for row, each in enumerate(images)}
            sequences = Sequences.gather([(sequences, [numbers[prompt.image] for prompt in prompts])], room=room)
        return sequences, sequences.extend(self.model, ids, valid)[:, -1]

    def _head(self, ids: tuple[int, ...]) -> Sequences:
        """Return the sequence of a head, one row."""
        if ids not in self._heads:
            head = Sequences(1, self.layers, self.answerer.device)
            if ids:
                head.extend(self.model, torch.tensor([ids], device=self.answerer.device))
            self._heads = {ids: head}  # one at a time: a run has one template
        return self._heads[ids]
