"""The tower of a loaded model under chosen experts.

``N`` vision tokens an image, ``D`` the language model's width.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor

from tove_llava.core.errors import DataError
from tove_llava.inference.generation import Answerer
from tove_llava.inference.replies import Request
from tove_llava.inference.routing_map import RoutingMap, routing_map
from tove_llava.tower import ToveVisionModel

AT_ONCE = 16  # images that the tower encodes at a time: this bounds its memory
KEPT = 32  # images whose features are kept: a conversation sends its images again with every question


class Vision:
    """Reads images with any experts, in one thread at a time.

    Attributes:
        experts: all that can be chosen (those that are attached now), in the order of the gate's columns.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self.tower: ToveVisionModel | None = answerer.tower if isinstance(answerer.tower, ToveVisionModel) else None
        self.experts: tuple[str, ...] = () if self.tower is None else tuple(self.tower.active_experts)
        self._image_tokens: dict[tuple[str, ...], int] = {}
        # By content and experts; the least recently used come first.
        self._known: OrderedDict[tuple[bytes, tuple[str, ...]], Tensor] = OrderedDict()

    def choose(self, experts: Collection[str] | None) -> tuple[str, ...]:
        """Return the chosen experts (None: all) in the gate's order.

        Raises:
            DataError: the model has no such expert.
        """
        if experts is None:
            return self.experts
        names = {experts} if isinstance(experts, str) else set(experts)
        unknown = sorted(names - set(self.experts))
        if unknown:
            known = ", ".join(self.experts) or "none: its vision tower is only CLIP"
            raise DataError(f"unknown expert(s) {', '.join(unknown)}; this model has: {known}")
        return tuple(name for name in self.experts if name in names)

    def image_tokens(self, experts: tuple[str, ...]) -> int:
        """Return N with these experts."""
        if self.tower is None or not self.experts:
            return self.answerer.num_image_tokens
        if experts not in self._image_tokens:
            config = copy(self.tower.config)  # the tower's own belongs to the thread that reads
            config.detached_experts = [name for name in config.expert_names if name not in experts]
            self._image_tokens[experts] = config.num_image_tokens
        return self._image_tokens[experts]

    def read(self, requests: Sequence[Request]) -> list[list[Tensor]]:
        """Return each request's features [N, D], and note the seconds spent.

        Requests with equal experts are encoded together.
        """
        keys = [
            [
                (hashlib.blake2b(image.cpu().contiguous().numpy().data).digest(), request.experts)
                for image in request.pixels
            ]
            for request in requests
        ]
        for experts in {request.experts for request in requests if request.pixels}:
            started = time.perf_counter()
            mine = [(key, request) for key, request in zip(keys, requests, strict=True) if request.experts == experts]
            images = {key: image for each, request in mine for key, image in zip(each, request.pixels, strict=True)}
            new = [key for key in images if key not in self._known]
            with self._attached(experts):
                for start in range(0, len(new), AT_ONCE):
                    batch = new[start : start + AT_ONCE]
                    features = self.answerer.features(torch.stack([images[key] for key in batch]))
                    # Copies, because each row of a batch would keep the whole batch in memory.
                    self._known.update((key, each.clone()) for key, each in zip(batch, features, strict=True))
            if self.answerer.device.type == "cuda":
                torch.cuda.synchronize(self.answerer.device)
            for _, request in mine:
                request.tower = time.perf_counter() - started if request.pixels else 0.0
        found = [[self._known[key] for key in each] for each in keys]
        for each in keys:
            for key in each:
                self._known.move_to_end(key)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return found

    def forget(self) -> None:
        """Free the features that are kept."""
        self._known.clear()

    def routing(self, pixels: Tensor, experts: tuple[str, ...]) -> RoutingMap | None:
        """Return one image's routing; None without a gate or without experts."""
        if self.tower is None or not experts:
            return None
        with self._attached(experts):
            return routing_map(self.tower, pixels)

    @contextmanager
    def _attached(self, experts: tuple[str, ...]) -> Iterator[None]:
        """Attach exactly these experts within a ``with`` block."""
        detached = [name for name in self.experts if name not in experts]
        if self.tower is None or not detached:
            yield
            return
        self.tower.detach_experts(detached)
        try:
            yield
        finally:
            self.tower.attach_experts(detached)
