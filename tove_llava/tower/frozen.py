"""CLIP and a tower's experts: frozen, and invisible to everything that trains.

They are deliberately not submodules of the tower. So no optimizer, state dict, LoRA or quantisation sweep, ZeRO
partition or ``train()`` can reach them, and ``from_pretrained`` cannot fill them with random numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import logging

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.safe_loading import from_pretrained
from tove_llava.core.sources import Source
from tove_llava.experts.expert_hub import ExpertHub
from tove_llava.experts.preparation import unnormalise
from tove_llava.experts.random_weights import random_weights
from tove_llava.tower.execution import Execution
from tove_llava.tower.pixels import check_pixels
from tove_llava.tower.tower_config import ToveVisionConfig

CLIP = ""  # CLIP's name among the experts'


@dataclass
class TowerFeatures:
    """The frozen part's output for B images, which can be kept.

    Args:
        base: ``[B,N,d]`` CLIP's tokens.
        experts: feature map ``[B,d_k,h_k,w_k]`` by expert, every value finite.
        usable: ``[B]`` bool by expert, False for images whose output was not finite; empty when all are.
    """

    base: Tensor
    experts: dict[str, Tensor] = field(default_factory=dict)
    usable: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return B, the number of images."""
        return len(self.base)

    @classmethod
    def cat(cls, parts: Sequence[TowerFeatures]) -> TowerFeatures:
        """Concatenate the images of several parts, which must hold the same experts."""
        usable = {}
        for name in sorted({name for part in parts for name in part.usable}):
            marks = [part.usable.get(name) for part in parts]
            everywhere = [torch.ones(len(part), dtype=torch.bool, device=part.base.device) for part in parts]
            usable[name] = torch.cat([x if x is not None else ones for x, ones in zip(marks, everywhere, strict=True)])
        return cls(
            base=torch.cat([part.base for part in parts]),
            experts={name: torch.cat([part.experts[name] for part in parts]) for name in parts[0].experts},
            usable=usable,
        )

    def to(self, *args: Any, **kwargs: Any) -> TowerFeatures:
        """Move and cast like ``Tensor.to``; only floating-point tensors are cast."""
        devices = [arg for arg in args if not isinstance(arg, torch.dtype)]
        others = {key: value for key, value in kwargs.items() if key != "dtype"}
        return self.map(lambda x: x.to(*args, **kwargs) if x.is_floating_point() else x.to(*devices, **others))

    def pin_memory(self) -> TowerFeatures:
        """Copy to page-locked memory; a ``DataLoader`` calls this."""
        return self.map(torch.Tensor.pin_memory)

    def map(self, fn: Callable[[Tensor], Tensor]) -> TowerFeatures:
        """Apply ``fn`` to every tensor, e.g. ``features.map(lambda x: x[:4])``."""
        return TowerFeatures(
            base=fn(self.base),
            experts={name: fn(x) for name, x in self.experts.items()},
            usable={name: fn(x) for name, x in self.usable.items()},
        )


class FrozenBackbones:
    """Loads, moves and runs CLIP and the experts of one tower."""

    def __init__(self, config: ToveVisionConfig) -> None:
        self.config = config
        self.clip: CLIPVisionModel | None = None
        self.hub = ExpertHub([])  # until experts are loaded
        self.execution = Execution()
        self._attention: str | None = None  # implementation that the loaded encoders have

    def set_execution(self, name: str) -> None:
        """See :meth:`ToveVisionModel.set_execution`."""
        self.execution = Execution(name)
        self._lay_out()

    def _lay_out(self) -> None:
        """Set convolutions' memory layout; channels last is faster on a GPU."""
        for name in self.hub.names:
            expert = self.hub[name]
            if expert.convolutional and expert.is_loaded:
                last = self.execution.mode.concurrent and expert.device.type == "cuda"
                expert.network.to(memory_format=torch.channels_last if last else torch.contiguous_format)

    def is_loaded(self, names: list[str]) -> bool:
        """Tell if CLIP and the named experts are in memory."""
        return self.clip is not None and self.hub.is_loaded(names)

    def load(
        self, names: list[str], *, base_dir: str | os.PathLike[str] | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load CLIP and the named experts that are not yet loaded."""
        with _outside_zero3():
            if self.clip is None:
                self.clip = load_clip(self.config, base_dir)
            if not self.hub.names:
                self.hub = ExpertHub(self.config.experts, base_dir=None if base_dir is None else Path(base_dir))
            with _quiet():
                self.hub.load(names)
            self.hub.eval()
        self._attention = None
        self._follow_attention()
        self.apply(lambda tensor: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None))

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a move or cast of the tower to the backbones."""
        self.execution.reset()
        for module in self.modules():
            module._apply(fn)
        self._lay_out()

    def modules(self) -> Iterator[nn.Module]:
        """Yield CLIP, if it is loaded, and the hub."""
        if self.clip is not None:
            yield self.clip
        yield self.hub

    @torch.no_grad()
    def encode(self, pixel_values: Tensor, names: list[str], *, strict: bool) -> TowerFeatures:
        """Compute CLIP's tokens and the named experts' feature maps; see :meth:`ToveVisionModel.encode`."""
        assert self.clip is not None
        check_pixels(pixel_values, self.config.image_size)
        self._follow_attention()
        # Weights of 16 bits compute in their own dtype, as for cached features: autocast would take the norms and the
        # whole residual stream to float32, and cast them back for each layer.
        device = pixel_values.device.type
        own = self.clip.dtype != torch.float32 and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if own else nullcontext():
            made = self.execution.run(self, pixel_values, names)
        base = made.pop(CLIP)  # [B,N,d]
        seen = self.hub.check(made, strict)
        return TowerFeatures(base=base, experts=seen.features, usable={} if strict else seen.valid)

    def networks(self, names: Sequence[str]) -> dict[str, object]:
        """Implement :class:`~tove_llava.tower.execution.Encoders`, as do the next two methods."""
        return {CLIP: self.clip, **{name: self.hub[name].backbone for name in names}}

    def functions(self, names: Sequence[str]) -> dict[str, Callable[[Tensor], Tensor]]:
        return {CLIP: self._clip_tokens, **{name: self.hub[name].features for name in names}}

    def tasks(
        self, pixel_values: Tensor, names: Sequence[str], compiled: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> dict[str, partial[Tensor]]:
        size = (self.config.clip_config.image_size,) * 2
        clip_pixels = pixel_values
        if pixel_values.shape[-2:] != size:
            clip_pixels = F.interpolate(pixel_values.float(), size, mode="bicubic", align_corners=False, antialias=True)
        tasks: dict[str, partial[Tensor]] = {CLIP: partial(compiled.get(CLIP, self._clip_tokens), clip_pixels)}
        if names:
            pixels = unnormalise(pixel_values, self.config.image_mean, self.config.image_std)
            for name, prepared in self.hub.condition(pixels, names).items():
                tasks[name] = partial(self.hub[name].__call__, pixels, prepared=prepared, encode=compiled.get(name))
        return tasks

    def _clip_tokens(self, pixels: Tensor) -> Tensor:
        """Compute ``[B,N,d]``, without the class token."""
        assert self.clip is not None
        return self.clip(pixels).last_hidden_state[:, 1:]

    def unload(self, names: list[str]) -> None:
        """Free the named experts' weights."""
        self.hub.unload(name for name in names if name in self.hub.names)
        self.execution.reset()  # compiled functions hold weights too

    def _follow_attention(self) -> None:
        """Give the encoders the tower's attention implementation, also after a later change."""
        wanted = self.config._attn_implementation
        if wanted is None or wanted == self._attention:
            return
        with _quiet():  # some networks offer no choice
            if self.clip is not None:
                self.clip.set_attn_implementation(wanted)
            self.hub.set_attention(wanted)
        self._attention = wanted
        self.execution.reset()


def load_clip(
    config: ToveVisionConfig,
    base_dir: str | os.PathLike[str] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> CLIPVisionModel:
    """Load frozen CLIP up to the layer whose tokens are used.

    Args:
        base_dir: checkpoint folder to which a source such as ``hf:./backbones/clip`` is relative.
        tensors: CLIP's weights, instead of those of the source.

    Raises:
        ConfigError: the configuration names no source.
        CheckpointError: the source is missing, or is not the CLIP that the configuration describes.
    """
    given: dict[str, Any] = {} if tensors is None else {"state_dict": dict(tensors)}
    source: Source | None = None
    clip_config = CLIPVisionConfig(**{**config.clip_config.to_dict(), "num_hidden_layers": config.num_clip_layers})
    clip_config._attn_implementation = config._attn_implementation
    if tensors is None:
        if not config.clip_source:
            raise ConfigError(
                "the tower's configuration names no clip_source, e.g. hf:openai/clip-vit-large-patch14-336"
            )
        source = Source.parse(config.clip_source).resolve(base_dir)
        if source.is_random:
            with random_weights(source):
                clip = CLIPVisionModel(clip_config)
            clip.post_layernorm = nn.Identity()
            return clip.eval().requires_grad_(False)
    with _quiet():
        clip, info = from_pretrained(
            CLIPVisionModel,
            source,
            "CLIP",
            revision=config.clip_revision or "main",
            config=clip_config,
            dtype=torch.float32,
            output_loading_info=True,
            **given,
        )
    # The norm after the last block only reads the class token, which LLaVA does not use; it may be missing.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("post_layernorm."))
    clip.post_layernorm = nn.Identity()
    if missing or info["mismatched_keys"]:
        raise CheckpointError(
            f"{source or 'this'} is not the CLIP that this tower was built on: missing {missing[:5]}, "
            f"other shapes {list(info['mismatched_keys'])[:5]}. Give the right clip_source."
        )
    return clip.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence reports of unused weights; missing ones still raise errors."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _outside_zero3() -> Iterator[None]:
    """Hide DeepSpeed's configuration: under ZeRO-3 ``from_pretrained`` would partition the weights."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    active = reference() if reference is not None else None
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if active is not None:
            hf_deepspeed.set_hf_deepspeed_config(active)
