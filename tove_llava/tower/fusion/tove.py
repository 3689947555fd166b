"""ToVE: a token-aware gate over experts, residual knowledge transfer (arXiv 2504.00691; our choices: docs/design.md).

``T' = T + W_o( sum_k G_k * H_k )``, where ``H_k = GELU(Linear_k(LayerNorm(U_k)))`` on the token grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tove_llava.errors import ConfigError
from tove_llava.tower.balance import BalanceStatistics
from tove_llava.tower.configuration import ToveVisionConfig
from tove_llava.tower.fusion.base import FUSIONS, Fusion, FusionOutput, GateInputs
from tove_llava.tower.gate import GateOutput, TokenGate


def resample_grid(features: torch.Tensor, size: int) -> torch.Tensor:
    """``[B,c,h,w]`` -> ``[B,c,size,size]``: bilinear, antialiased when shrinking; untouched when the size is right.

    Computed in float32 (antialiasing has no bfloat16 kernel on the CPU), returned in the input's dtype.
    """
    height, width = features.shape[-2:]
    if (height, width) == (size, size):
        return features
    shrinking = height > size or width > size
    resized = F.interpolate(
        features.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=shrinking
    )
    return resized.to(features.dtype)


class ClosedLinear(nn.Linear):
    """A linear layer that starts at zero, so that the residual branch behind it starts closed."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class TokenEmbedding(nn.Module):
    """Expert-specific first layer for an encoder's tokens: resample, LayerNorm, Linear, GELU."""

    def __init__(self, channels: int, width: int, *, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, width)

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """``[B,c,h,w]`` -> ``[B*N,c]``: what :meth:`forward` takes, one row per token."""
        return resample_grid(features, self.grid).flatten(2).transpose(1, 2).flatten(0, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[R,c]`` -> ``[R,m]``."""
        return F.gelu(self.linear(self.norm(rows.to(self.norm.weight.dtype))))

    def empty_rows(self, device: torch.device) -> torch.Tensor:
        return torch.empty(0, self.linear.in_features, device=device)


class MapEmbedding(nn.Module):
    """Expert-specific first layer for a dense prediction: a small convolutional stem with the tower's patch size.

    A map's values are used as they are: bringing them to the order of 1 is the expert's business, it knows its units.
    A 3x3 convolution, GELU, and a patch embedding, GELU. A map in which a whole number of cells makes up each token
    stays at its own resolution (its patch then covers the same part of the picture); any other is brought to the
    picture's.
    """

    def __init__(
        self, channels: int, width: int, *, map_size: tuple[int, int], image_size: int, grid: int, stem_width: int
    ) -> None:
        super().__init__()
        rows, columns = map_size
        native = rows == columns and rows % grid == 0 and rows <= image_size
        self.map_size = rows if native else image_size
        self.patch_size = patch_size = self.map_size // grid
        self.conv = nn.Conv2d(channels, stem_width, kernel_size=3, padding=1)
        # A convolution of kernel and stride p, written on unfolded patches, so that tokens can be left out.
        self.linear = nn.Linear(stem_width * patch_size**2, width)

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """``[B,c,h,w]`` -> ``[B*N, stem_width*p*p]``."""
        maps = resample_grid(features, self.map_size).to(self.conv.weight.dtype)  # [B,c,S,S]
        stem = F.gelu(self.conv(maps))  # [B,s,S,S]
        patches = F.unfold(stem, kernel_size=self.patch_size, stride=self.patch_size)  # [B, s*p*p, N]
        return patches.transpose(1, 2).flatten(0, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[R, stem_width*p*p]`` -> ``[R,m]``."""
        return F.gelu(self.linear(rows.to(self.linear.weight.dtype)))

    def empty_rows(self, device: torch.device) -> torch.Tensor:
        # Through the convolution too: its parameters have to be in the graph like all others.
        empty = torch.empty(0, self.conv.in_channels, self.map_size, self.map_size, device=device)
        return self.conv(empty.to(self.conv.weight.dtype)).reshape(0, self.linear.in_features)


@FUSIONS.register("tove")
class ToveFusion(Fusion):
    """The gate, one embedding per expert, and the shared output layer ``W_o`` (no bias, zero at initialisation)."""

    def __init__(self, config: ToveVisionConfig) -> None:
        super().__init__(config)
        options = _options(config.fusion_options or {}, stem_width=16)
        if not config.experts:
            raise ConfigError("fusion 'tove' needs at least one expert; for CLIP alone set fusion to 'none'")
        self.embeddings = nn.ModuleDict()
        for spec in config.expert_specs:
            if spec.width < 1:
                raise ConfigError(
                    f"expert {spec.name!r}: its width is not recorded in the configuration; build the configuration "
                    "with ToveVisionConfig.from_sources, which reads it from the source"
                )
            if spec.mode == "map":
                self.embeddings[spec.name] = MapEmbedding(
                    spec.width,
                    config.projection_dim,
                    map_size=spec.grid,
                    image_size=config.image_size,
                    grid=config.grid,
                    stem_width=options["stem_width"],
                )
            else:
                self.embeddings[spec.name] = TokenEmbedding(spec.width, config.projection_dim, grid=config.grid)
        slots = len(config.experts) + config.null_slot
        self.gate = TokenGate(config.hidden_size, slots, noisy=config.noisy_gating, top_k=config.top_k)
        self.output = ClosedLinear(config.projection_dim, config.hidden_size, bias=False)

    def forward(
        self,
        base: torch.Tensor,
        experts: Mapping[str, torch.Tensor],
        *,
        noise: torch.Tensor | None = None,
        usable: Mapping[str, torch.Tensor] | None = None,
    ) -> FusionOutput:
        batch, tokens, _ = base.shape
        attached = self.config.attached_experts
        if not attached and not self.training:
            routing = base.new_zeros(batch, tokens, self.gate.slots, dtype=torch.float32)
            return FusionOutput(tokens=base, routing=routing)
        inputs = GateInputs(
            tokens=base.detach(),
            noise=self._noise(base, noise),
            usable=self._usable(batch, base.device, usable),
        )
        gate = self._gate(inputs)
        mixed = self._mix(base, experts, gate)  # [B*N,m]
        delta = self.output(mixed)  # [B*N,d]
        return FusionOutput(
            tokens=base + delta.view_as(base).to(base.dtype),
            routing=gate.weights,
            gate_logits=gate.logits,
            gate_inputs=inputs,
        )

    def balance_statistics(self, inputs: GateInputs | list[GateInputs] | None) -> BalanceStatistics:
        device = self.gate.score.weight.device
        inputs = self._joined(inputs, device)
        names = self.config.expert_names
        attached = torch.tensor([name in self.config.attached_experts for name in names], device=device)
        gate = self._gate(inputs)
        batch, tokens = gate.weights.shape[:2]
        return BalanceStatistics(
            importance=gate.weights.sum(dim=(0, 1))[: len(names)],
            load=None if gate.load is None else gate.load.sum(dim=(0, 1))[: len(names)],
            tokens=torch.tensor(float(batch * tokens), device=device),
            attached=attached,
        )

    def _joined(self, inputs: GateInputs | list[GateInputs] | None, device: torch.device) -> GateInputs:
        if isinstance(inputs, GateInputs):
            return inputs
        if not inputs:
            tokens, slots = self.config.num_patches, self.gate.slots
            return GateInputs(
                tokens=torch.zeros(0, tokens, self.config.hidden_size, device=device),
                noise=torch.zeros(0, tokens, slots, device=device) if self._draws_noise else None,
            )
        noise = [part.noise for part in inputs if part.noise is not None]
        if len(noise) not in (0, len(inputs)):
            raise ValueError("gate inputs with and without noise cannot be joined")
        usable = None
        if any(part.usable is not None for part in inputs):
            experts = len(self.config.experts)
            usable = torch.cat(
                [
                    torch.ones(len(part.tokens), experts, dtype=torch.bool, device=device)
                    if part.usable is None
                    else part.usable
                    for part in inputs
                ]
            )
        return GateInputs(
            tokens=torch.cat([part.tokens for part in inputs]),
            noise=torch.cat(noise) if noise else None,
            usable=usable,
        )

    @property
    def _draws_noise(self) -> bool:
        return self.training and self.gate.noise is not None

    def _noise(self, base: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor | None:
        if not self._draws_noise:
            return None
        shape = (*base.shape[:2], self.gate.slots)
        if given is None:
            return torch.randn(shape, device=base.device, dtype=torch.float32)
        if tuple(given.shape) != shape:
            raise ConfigError(f"gate_noise has shape {tuple(given.shape)}, expected [images, tokens, slots] = {shape}")
        return given.to(base.device, torch.float32)

    def _usable(
        self, batch: int, device: torch.device, usable: Mapping[str, torch.Tensor] | None
    ) -> torch.Tensor | None:
        """``[B,K]`` bool, or None when every expert is usable for every image."""
        if not usable:
            return None
        everywhere = torch.ones(batch, dtype=torch.bool, device=device)
        return torch.stack([usable.get(name, everywhere).to(device) for name in self.config.expert_names], dim=1)

    def _gate(self, inputs: GateInputs) -> GateOutput:
        names, batch, device = self.config.expert_names, inputs.tokens.shape[0], inputs.tokens.device
        columns = [name not in self.config.detached_experts for name in names] + [True] * self.config.null_slot
        allowed = torch.tensor(columns, dtype=torch.bool, device=device).expand(batch, -1)  # [B,S]
        if inputs.usable is not None:
            null = torch.ones(batch, self.config.null_slot, dtype=torch.bool, device=device)
            allowed = allowed & torch.cat([inputs.usable, null], dim=1)
        return self.gate(inputs.tokens, allowed, inputs.noise)

    def _mix(
        self,
        base: torch.Tensor,
        experts: Mapping[str, torch.Tensor],
        gate: GateOutput,
    ) -> torch.Tensor:
        """``sum_k G_k * H_k`` as ``[B*N,m]``; rows of H_k that no token selects are not computed."""
        weights = gate.weights.flatten(0, 1)  # [B*N,S]
        sparse = self.config.top_k is not None and self.config.top_k < self.gate.slots
        selected = gate.selected.flatten(0, 1) if sparse else None
        mixed: torch.Tensor | None = None
        attached = set(self.config.attached_experts)
        for k, name in enumerate(self.config.expert_names):
            embedding = self.embeddings[name]
            if name not in attached:
                if self.training:  # no rows: nothing is computed, yet every rank and step touches the same parameters
                    touched = embedding(embedding.empty_rows(base.device)).sum()
                    mixed = self._zeros(base, touched) if mixed is None else mixed
                    mixed = mixed + touched.to(mixed.dtype)
                continue
            rows = embedding.rows(experts[name])  # [B*N,c]
            if selected is None:
                hidden = embedding(rows)
                part = weights[:, k, None].to(hidden.dtype) * hidden
                mixed = part if mixed is None else mixed + part
            else:
                chosen = selected[:, k].nonzero().squeeze(1)  # [R]
                hidden = embedding(rows[chosen])
                part = weights[chosen, k, None].to(hidden.dtype) * hidden
                mixed = self._zeros(base, part) if mixed is None else mixed
                mixed = mixed.index_add(0, chosen, part.to(mixed.dtype))
        return self._zeros(base, self.output.weight) if mixed is None else mixed

    def _zeros(self, base: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(
            base.shape[0] * base.shape[1], self.config.projection_dim, device=base.device, dtype=like.dtype
        )


def _options(given: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    unknown = set(given) - set(defaults)
    if unknown:
        raise ConfigError(f"unknown fusion_options {sorted(unknown)} of 'tove'; it knows: {sorted(defaults)}")
    return {**defaults, **given}
