"""CLIP and the experts of a tower: frozen, run without autograd, and invisible to everything that trains.

They are deliberately not submodules of the tower. Thereby no optimiser, state dict, LoRA or quantisation sweep, ZeRO
partition or ``train()`` can reach them, and ``from_pretrained`` cannot fill them with random numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import logging

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.sources import Source
from tove_llava.experts.base import Expert
from tove_llava.experts.hub import ExpertHub
from tove_llava.experts.preparation import unnormalise
from tove_llava.tower.configuration import ToveVisionConfig
from tove_llava.tower.execution import Execution

CLIP = ""  # CLIP's name among the experts'


@dataclass
class TowerFeatures:
    """What the frozen part gives for B images; may be computed once and kept.

    Args:
        base: ``[B,N,d]`` CLIP's tokens.
        experts: feature map ``[B,d_k,h_k,w_k]`` by expert, every value finite.
        usable: ``[B]`` bool by expert, False for images for which its output was not finite; empty when all are fine.
    """

    base: torch.Tensor
    experts: dict[str, torch.Tensor] = field(default_factory=dict)
    usable: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """B, the number of images."""
        return len(self.base)

    @classmethod
    def cat(cls, parts: Sequence[TowerFeatures]) -> TowerFeatures:
        """The images of several in a row; all must hold the same experts."""
        everywhere = [torch.ones(len(part), dtype=torch.bool, device=part.base.device) for part in parts]
        marked = {name for part in parts for name in part.usable}
        return cls(
            base=torch.cat([part.base for part in parts]),
            experts={name: torch.cat([part.experts[name] for part in parts]) for name in parts[0].experts},
            usable={
                name: torch.cat([part.usable.get(name, all_) for part, all_ in zip(parts, everywhere, strict=True)])
                for name in sorted(marked)
            },
        )

    def to(self, *args: Any, **kwargs: Any) -> TowerFeatures:
        """As ``Tensor.to``; a dtype goes to floating-point tensors alone."""
        others = {key: value for key, value in kwargs.items() if key != "dtype"}
        places = [arg for arg in args if not isinstance(arg, torch.dtype)]
        return self.map(lambda x: x.to(*args, **kwargs) if x.is_floating_point() else x.to(*places, **others))

    def pin_memory(self) -> TowerFeatures:
        """In page-locked memory, from which a GPU copies by itself; a ``DataLoader`` calls this."""
        return self.map(torch.Tensor.pin_memory)

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> TowerFeatures:
        """Applies ``fn`` to every tensor, e.g. ``features.map(lambda x: x[:4])``."""
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
        self.hub: ExpertHub | None = None
        self.execution = Execution()
        self._attention: str | None = None  # implementation that the loaded encoders use

    def set_execution(self, name: str) -> None:
        """See :meth:`ToveVisionModel.set_execution`."""
        self.execution = Execution(name)
        self._lay_out()

    def _lay_out(self) -> None:
        """Gives convolutional networks the execution's memory layout: channels last is a GPU's faster one."""
        for name in [] if self.hub is None else self.hub.names:
            expert = self._expert(name)
            if expert.convolutional and expert.is_loaded:
                last = self.execution.mode.concurrent and expert.device.type == "cuda"
                expert.network.to(memory_format=torch.channels_last if last else torch.contiguous_format)

    def is_loaded(self, names: list[str]) -> bool:
        """Whether CLIP and the named experts are in memory."""
        if self.clip is None:
            return False
        return not names or (self.hub is not None and self.hub.is_loaded(names))

    def load(
        self,
        names: list[str],
        *,
        base_dir: str | os.PathLike[str] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Loads CLIP and the named experts from their sources; what is loaded already stays as it is."""
        with _outside_zero3():
            if self.clip is None:
                self.clip = load_clip(self.config, base_dir)
            if self.hub is None:
                self.hub = ExpertHub(self.config.experts, base_dir=None if base_dir is None else Path(base_dir))
            with _quiet():
                self.hub.load(names)
            self.hub.eval()
        self._attention = None
        self._follow_attention()
        self.apply(lambda tensor: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None))

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Lets moves and casts of the tower reach the backbones."""
        self.execution.reset()
        for module in self.modules():
            module._apply(fn)
        self._lay_out()

    def modules(self) -> Iterator[nn.Module]:
        """CLIP and the hub, where they are loaded."""
        if self.clip is not None:
            yield self.clip
        if self.hub is not None:
            yield self.hub

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor, names: list[str], *, strict: bool) -> TowerFeatures:
        """CLIP's tokens and the named experts' feature maps; see :meth:`ToveVisionModel.encode`."""
        assert self.clip is not None
        size = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or tuple(pixel_values.shape[-2:]) != (size, size):
            raise ConfigError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected [images, 3, {size}, {size}]: "
                "the image processor and the tower's image_size disagree"
            )
        self._follow_attention()
        with _in_own_precision(self.clip.dtype, pixel_values.device.type):
            made = self.execution.run(self, pixel_values, names)
        base = made.pop(CLIP)  # [B,N,d]
        if not names:
            return TowerFeatures(base=base)
        assert self.hub is not None
        seen = self.hub.check(made, strict)
        return TowerFeatures(base=base, experts=seen.features, usable={} if strict else seen.valid)

    def networks(self, names: Sequence[str]) -> dict[str, object]:
        """See :class:`~tove_llava.tower.execution.Encoders`; so for the next two."""
        return {CLIP: self.clip, **{name: self._expert(name).backbone for name in names}}

    def functions(self, names: Sequence[str]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        return {CLIP: self._clip_tokens, **{name: self._expert(name).features for name in names}}

    def tasks(
        self,
        pixel_values: torch.Tensor,
        names: Sequence[str],
        compiled: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    ) -> dict[str, partial[torch.Tensor]]:
        tasks: dict[str, partial[torch.Tensor]] = {
            CLIP: partial(compiled.get(CLIP, self._clip_tokens), self._clip_pixels(pixel_values))
        }
        if names:
            assert self.hub is not None
            pixels = unnormalise(pixel_values, self.config.image_mean, self.config.image_std)
            for name, prepared in self.hub.condition(pixels, names).items():
                tasks[name] = partial(self._expert(name).__call__, pixels, prepared=prepared, encode=compiled.get(name))
        return tasks

    def _expert(self, name: str) -> Expert:
        assert self.hub is not None
        return self.hub[name]

    def _clip_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[B,N,d]``, without the class token."""
        assert self.clip is not None
        return self.clip(pixels).last_hidden_state[:, 1:]

    def _clip_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        size = self.config.clip_config.image_size
        if self.config.image_size == size:
            return pixel_values
        return F.interpolate(pixel_values.float(), (size, size), mode="bicubic", align_corners=False, antialias=True)

    def unload(self, names: list[str]) -> None:
        """Frees the named experts' weights."""
        if self.hub is not None:
            self.hub.unload(names)
        self.execution.reset()  # what was compiled holds weights too

    def _follow_attention(self) -> None:
        """Gives the encoders the attention implementation that the tower has, also when it is changed later."""
        wanted = self.config._attn_implementation
        if wanted is None or wanted == self._attention:
            return
        with _quiet():  # about networks that let none be chosen
            if self.clip is not None:
                self.clip.set_attn_implementation(wanted)
            if self.hub is not None:
                self.hub.set_attention(wanted)
        self._attention = wanted
        self.execution.reset()


def load_clip(
    config: ToveVisionConfig,
    base_dir: str | os.PathLike[str] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> CLIPVisionModel:
    """CLIP up to the layer whose tokens are used, frozen. The layers above are never built.

    Args:
        base_dir: checkpoint folder to which a source such as ``hf:./backbones/clip`` is relative.
        tensors: CLIP's own, which are then not read from the source.

    Raises:
        ConfigError: the configuration names no source.
        CheckpointError: the source is not there, or is not the CLIP that the configuration describes.
    """
    where: dict[str, Any] = {"pretrained_model_name_or_path": None, "state_dict": dict(tensors or {})}
    source: Source | str = "the given tensors"
    if tensors is None:
        if not config.clip_source:
            raise ConfigError(
                "the tower's configuration names no clip_source, e.g. hf:openai/clip-vit-large-patch14-336"
            )
        source = Source.parse(config.clip_source).resolve(base_dir)
        where = source.pretrained()
    clip_config = CLIPVisionConfig(**{**config.clip_config.to_dict(), "num_hidden_layers": config.num_clip_layers})
    clip_config._attn_implementation = config._attn_implementation
    try:
        with _quiet():
            clip, info = CLIPVisionModel.from_pretrained(
                **where,
                revision=config.clip_revision or "main",
                config=clip_config,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot load CLIP from {source}: {error}") from error
    # The norm after the last block reads the class token alone, which LLaVA does not use: it is neither needed nor run.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("post_layernorm."))
    clip.post_layernorm = nn.Identity()
    if missing or info["mismatched_keys"]:
        raise CheckpointError(
            f"{source} is not the CLIP that this tower was built on: missing {missing[:5]}, "
            f"other shapes {list(info['mismatched_keys'])[:5]}. Give the right clip_source."
        )
    return clip.eval().requires_grad_(False)


def _in_own_precision(dtype: torch.dtype, device: str) -> AbstractContextManager[Any]:
    """Weights of 16 bits compute in their own dtype whatever is around them, as they do where features are cached.

    Autocast would take the norms, and with them the whole residual stream, to float32 and cast it back for each layer.
    """
    if dtype == torch.float32 or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without reports of weights that are not used, such as CLIP's upper layers; what is missing is an error."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _outside_zero3() -> Iterator[None]:
    """Loads as if DeepSpeed were not there: with ZeRO-3 configured, ``from_pretrained`` would partition weights."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    active = reference() if reference is not None else None
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if active is not None:
            hf_deepspeed.set_hf_deepspeed_config(active)
