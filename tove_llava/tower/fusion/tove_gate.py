"""ToVE: a token-aware gate over experts, residual knowledge transfer (arXiv 2504.00691).

``T' = T + W_o( sum_k G_k * H_k )``, where ``H_k = GELU(Linear_k(LayerNorm(U_k)))`` on the token grid.
The choices that the paper leaves open: docs/background/design.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tove_llava.core.errors import ConfigError
from tove_llava.tower.balance_loss import BalanceStatistics
from tove_llava.tower.embedding import STEM_WIDTH, ClosedLinear, ExpertEmbeddings
from tove_llava.tower.fused import gated_gelu_sum
from tove_llava.tower.fusion.base import ByExpert, Fusion, FusionOutput, GateInputs, register_fusion
from tove_llava.tower.gate import Gate, GateOutput
from tove_llava.tower.tower_config import GATES, ToveVisionConfig


@register_fusion("tove")
class ToveFusion(Fusion):
    """The gate, each expert's embedding, and ``W_o`` (no bias, starts at zero)."""

    option_defaults: ClassVar[Mapping[str, Any]] = {"stem_width": STEM_WIDTH, "gate": "token"}
    output_layer: ClassVar[type[nn.Linear]] = ClosedLinear

    def __init__(self, config: ToveVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = ExpertEmbeddings(config, self.options["stem_width"])
        self.gate: Gate = GATES.get(self.options["gate"]).from_config(config, len(config.experts) + config.null_slot)
        if config.top_k not in (None, self.gate.top_k):
            raise ConfigError(f"gate {self.options['gate']!r} knows no top_k; leave top_k={config.top_k} out")
        self.output = self.output_layer(config.projection_dim, config.clip_width, bias=False)

    def combine(self, base: Tensor, delta: Tensor) -> Tensor:
        """Combine CLIP's tokens ``[B,N,d]`` with the knowledge for them ``[B,N,d]``."""
        return base + delta

    def forward(
        self, base: Tensor, experts: ByExpert, *, noise: Tensor | None = None, usable: ByExpert | None = None
    ) -> FusionOutput:
        batch, tokens, _ = base.shape
        attached = self.config.attached_experts
        if not attached and not self.training:
            routing = base.new_zeros(batch, tokens, self.gate.slots, dtype=torch.float32)
            return FusionOutput(tokens=self.combine(base, torch.zeros_like(base)), routing=routing)
        inputs = GateInputs(
            tokens=base.detach(), noise=self._noise(base, noise), usable=self._usable(batch, base.device, usable)
        )
        gate = self._gate(inputs)
        sparse = self.gate.top_k is not None and self.gate.top_k < self.gate.slots
        mixed = (self._mix_selected if sparse else self._mix_all)(base, experts, gate)  # [B*N,m]
        if self.training:
            for name in self.config.detached_experts:  # in one order on every rank
                mixed = mixed + self.embeddings.touched(name, base.device).to(mixed.dtype)
        delta = self.output(mixed)  # [B*N,d]
        return FusionOutput(
            tokens=self.combine(base, delta.view_as(base).to(base.dtype)),
            routing=gate.weights,
            gate_logits=gate.logits,
            gate_inputs=inputs,
        )

    def transfers(self, base: Tensor, experts: ByExpert, *, usable: ByExpert | None = None) -> dict[str, Tensor]:
        inputs = GateInputs(tokens=base.detach(), usable=self._usable(len(base), base.device, usable))
        weights = self._gate(inputs).weights  # [B,N,S]
        parts = {}
        for k, name in enumerate(self.config.expert_names):
            if name in self.config.attached_experts:
                hidden = self.embeddings.hidden(name, experts[name], None)  # [B,N,m]
                parts[name] = self.output(weights[..., k, None].to(hidden.dtype) * hidden)
        return parts

    def balance_statistics(self, inputs: GateInputs | list[GateInputs] | None) -> BalanceStatistics:
        device = self.output.weight.device
        inputs = self._joined(inputs, device)
        names = self.config.expert_names
        attached = _mask(tuple(name in self.config.attached_experts for name in names), device)
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
                tokens=torch.zeros(0, tokens, self.config.clip_width, device=device),
                noise=torch.zeros(0, tokens, slots, device=device) if self._draws_noise else None,
            )
        noise = [part.noise for part in inputs if part.noise is not None]
        if len(noise) not in (0, len(inputs)):
            raise ValueError("gate inputs with and without noise cannot be joined")
        usable = None
        if any(part.usable is not None for part in inputs):
            experts = len(self.config.experts)
            ones = [torch.ones(len(part.tokens), experts, dtype=torch.bool, device=device) for part in inputs]
            marks = zip(inputs, ones, strict=True)
            usable = torch.cat([every if part.usable is None else part.usable for part, every in marks])
        return GateInputs(
            tokens=torch.cat([part.tokens for part in inputs]), noise=torch.cat(noise) if noise else None, usable=usable
        )

    @property
    def _draws_noise(self) -> bool:
        return self.training and self.gate.noise is not None

    def _noise(self, base: Tensor, given: Tensor | None) -> Tensor | None:
        if not self._draws_noise:
            return None
        shape = (*base.shape[:2], self.gate.slots)
        if given is None:
            return torch.randn(shape, device=base.device, dtype=torch.float32)
        if tuple(given.shape) != shape:
            raise ConfigError(f"gate_noise has shape {tuple(given.shape)}, expected [images, tokens, slots] = {shape}")
        return given.to(base.device, torch.float32)

    def _usable(self, batch: int, device: torch.device, usable: ByExpert | None) -> Tensor | None:
        """Return ``[B,K]`` bool; None if all experts are usable everywhere."""
        if not usable:
            return None
        everywhere = torch.ones(batch, dtype=torch.bool, device=device)
        return torch.stack([usable.get(name, everywhere).to(device) for name in self.config.expert_names], dim=1)

    def _gate(self, inputs: GateInputs) -> GateOutput:
        names, batch, device = self.config.expert_names, inputs.tokens.shape[0], inputs.tokens.device
        columns = [name not in self.config.detached_experts for name in names] + [True] * self.config.null_slot
        allowed = _mask(tuple(columns), device).expand(batch, -1)  # [B,S]
        if inputs.usable is not None:
            null = torch.ones(batch, self.config.null_slot, dtype=torch.bool, device=device)
            allowed = allowed & torch.cat([inputs.usable, null], dim=1)
        return self.gate(inputs.tokens, allowed, inputs.noise)

    def _mix_all(self, base: Tensor, experts: ByExpert, gate: GateOutput) -> Tensor:
        """Compute ``sum_k G_k * H_k`` as ``[B*N,m]``."""
        hidden, columns = [], []
        for name in self.config.attached_experts:
            embedding = self.embeddings[name]
            hidden.append(embedding(embedding.rows(experts[name]), activate=False))  # [B*N,m]
            columns.append(gate.weights[..., self.config.expert_names.index(name)].flatten())
        if not hidden:
            return self._zeros(base, self.output.weight)
        return gated_gelu_sum(hidden, torch.stack(columns, dim=1), fused=self.fused)

    def _mix_selected(self, base: Tensor, experts: ByExpert, gate: GateOutput) -> Tensor:
        """Compute the same sum without rows that no token selects."""
        weights, selected = gate.weights.flatten(0, 1), gate.selected.flatten(0, 1)  # [B*N,S]
        mixed: Tensor | None = None
        for name in self.config.attached_experts:
            k, embedding = self.config.expert_names.index(name), self.embeddings[name]
            chosen = selected[:, k].nonzero().squeeze(1)  # [R]
            hidden = embedding(embedding.rows(experts[name])[chosen])
            part = weights[chosen, k, None].to(hidden.dtype) * hidden
            mixed = self._zeros(base, part) if mixed is None else mixed
            mixed = mixed.index_add(0, chosen, part.to(mixed.dtype))
        return self._zeros(base, self.output.weight) if mixed is None else mixed

    def _zeros(self, base: Tensor, like: Tensor) -> Tensor:
        return torch.zeros(
            base.shape[0] * base.shape[1], self.config.projection_dim, device=base.device, dtype=like.dtype
        )


@lru_cache(maxsize=64)  # without it each call would copy from host to device and wait
def _mask(columns: tuple[bool, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a cached tensor must be usable outside inference mode too
        return torch.tensor(columns, dtype=torch.bool, device=device)
