"""The output of a vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from tove_llava.tower.fusion import GateInputs


@dataclass
class ToveVisionOutput(ModelOutput):
    """The tower's tokens, and its gate's decisions.

    Args:
        last_hidden_state: ``[B,N,d]`` the tower's tokens T'.
        pooler_output: set by LLaVA to the projected tokens, one ``[N,d_text]`` per image.
        hidden_states: ``(last_hidden_state,)``, which ``vision_feature_layer=-1`` indexes.
        routing: ``[B,N,S]`` float32 gate weights; S = K experts, plus one with a null slot. None without a gate.
        gate_logits: ``[B,N,S]`` float32, before noise and masks.
        gate_inputs: input of ``tower.balance_loss``; only in training.
        merge_loss: ``[B]`` float32, while the tower is merged (:mod:`tove_llava.train.merging`).
        experts: ``[B,d_k,h_k,w_k]`` feature map by expert, on request.
        expert_weights: ``[B,N]`` column of ``routing`` by expert, on request; None without a gate.

    Example:
        >>> tower = tove_llava.load_tower("tiny")
        >>> output = tower(image, output_experts=True)
        >>> output.last_hidden_state.shape, output.routing.shape
        (torch.Size([1, 36, 192]), torch.Size([1, 36, 4]))
        >>> output.experts["depth"].shape, output.expert_weights["depth"].shape
        (torch.Size([1, 1, 24, 24]), torch.Size([1, 36]))
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: Any = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    routing: torch.FloatTensor | None = None
    gate_logits: torch.FloatTensor | None = None
    gate_inputs: GateInputs | None = None
    merge_loss: torch.FloatTensor | None = None
    experts: dict[str, torch.Tensor] | None = None
    expert_weights: dict[str, torch.Tensor] | None = None
