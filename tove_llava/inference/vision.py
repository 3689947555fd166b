"""The tower of a loaded model under chosen experts.

``N`` vision tokens an image, ``D`` the language model's width.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor

from tove_llava.core.errors import DataError
from tove_llava.inference.generation import Answerer
from tove_llava.inference.replies import Request
from tove_llava.inference.routing import RoutingMap, routing_map
from tove_llava.tower import ToveVisionModel

PICTURES = 16  # at a time: what bounds the tower's memory


class Vision:
    """Reads pictures with any set of the model's experts. One thread at a time may read.

    Attributes:
        experts: all that can be chosen, in the order of the gate's columns: those that are attached now.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self.tower: ToveVisionModel | None = answerer.tower if isinstance(answerer.tower, ToveVisionModel) else None
        self.experts: tuple[str, ...] = () if self.tower is None else tuple(self.tower.active_experts)
        self._tokens: dict[frozenset[str], int] = {}

    def chosen(self, experts: Collection[str] | None) -> frozenset[str]:
        """The set of ``experts``; all for None.

        Raises:
            DataError: the model has no such expert.
        """
        if experts is None:
            return frozenset(self.experts)
        names = frozenset([experts] if isinstance(experts, str) else experts)
        unknown = sorted(names - set(self.experts))
        if unknown:
            known = ", ".join(self.experts) or "none: its vision tower is CLIP alone"
            raise DataError(f"unknown expert(s) {', '.join(unknown)}; this model has: {known}")
        return names

    def image_tokens(self, experts: frozenset[str]) -> int:
        """N with these experts."""
        if self.tower is None or not self.experts:
            return self.answerer.num_image_tokens
        if experts not in self._tokens:
            config = copy(self.tower.config)  # the tower's own belongs to the thread that reads
            config.detached_experts = [name for name in config.expert_names if name not in experts]
            self._tokens[experts] = config.num_image_tokens
        return self._tokens[experts]

    def read(self, requests: Sequence[Request]) -> list[list[Tensor]]:
        """What the language model reads of each request's pictures, [N, D] each; requests with equal experts together.

        Each request is told the seconds that its batch took.
        """
        groups: dict[frozenset[str], list[int]] = {}
        for place, request in enumerate(requests):
            if request.pixels:
                groups.setdefault(request.experts, []).append(place)
        found: list[list[Tensor]] = [[] for _ in requests]
        for experts, places in groups.items():
            started = time.perf_counter()
            pixels = [picture for place in places for picture in requests[place].pixels]
            features = iter(self._features(pixels, experts))
            for place in places:
                found[place] = [next(features) for _ in requests[place].pixels]
            if self.answerer.device.type == "cuda":
                torch.cuda.synchronize(self.answerer.device)
            for place in places:
                requests[place].tower = time.perf_counter() - started
        return found

    def routing(self, pixels: Tensor, experts: frozenset[str]) -> RoutingMap | None:
        """The routing of one picture [3, S, S]; None without a gate or without experts."""
        if self.tower is None or not experts:
            return None
        with self._attached(experts):
            return routing_map(self.tower, pixels)

    def _features(self, pixels: Sequence[Tensor], experts: frozenset[str]) -> list[Tensor]:
        with self._attached(experts):
            return [
                tokens
                for start in range(0, len(pixels), PICTURES)
                for tokens in self.answerer.features(torch.stack(list(pixels[start : start + PICTURES])))
            ]

    @contextmanager
    def _attached(self, experts: frozenset[str]) -> Iterator[None]:
        """Exactly these experts are attached within a ``with`` block."""
        out = [name for name in self.experts if name not in experts]
        if self.tower is None or not out:
            yield
            return
        self.tower.detach_experts(out)
        try:
            yield
        finally:
            self.tower.attach_experts(out)
