"""Attention for rows that hold several sequences, none of which sees another.

transformers' FlashAttention does this for the collator's ``cu_seq_lens_q``. This does the same without that package:
torch's own kernel for such rows on a GPU, and one causal attention per sequence elsewhere.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from tove_llava.core.errors import ConfigError

NAME = "tove_varlen"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each sequence, as a transformers attention function.

    Args:
        query: ``[1,H,T,d]``; key and value: ``[1,G,T,d]`` with ``H`` a multiple of ``G``.
        cu_seq_lens_q: int32 ``[sequences + 1]``, where each begins, and ``T``.
        max_length_q: the longest.

    Returns:
        ``[1,T,H,d]``, and None for the weights.
    """
    if cu_seq_lens_q is None or max_length_q is None or len(query) != 1 or attention_mask is not None:
        raise ConfigError("this attention takes only packed rows: one row, cu_seq_lens_q, max_length_q and no mask")
    device = query.device.type
    if torch.is_autocast_enabled(device):  # like torch's own attention; rotary positions may have made them float32
        query, key, value = (states.to(torch.get_autocast_dtype(device)) for states in (query, key, value))
    grouped = key.shape[1] != query.shape[1]
    if _has_kernel(query) and dropout == 0:
        return _kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    dtype = query.dtype
    autocast: AbstractContextManager[Any] = nullcontext()
    if device == "cpu":  # torch's backward pass of attention is more than twice as fast in float32 there
        query, key, value = query.float(), key.float(), value.float()
        autocast = torch.autocast(device, enabled=False)
    bounds = cu_seq_lens_q.tolist()
    with autocast:
        parts = [
            scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                dropout_p=dropout,
                is_causal=True,
                scale=scaling,
                enable_gqa=grouped,
            )
            for start, end in zip(bounds, bounds[1:], strict=False)
        ]
    return torch.cat(parts, dim=2).transpose(1, 2).to(dtype), None  # [1,T,H,d]


def _has_kernel(query: Tensor) -> bool:
    return _runs_on(query) and {"window_size", "scale"} <= _kernel_parameters()


def _kernel_parameters() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _runs_on(query: Tensor) -> bool:
    """Return whether torch's kernel knows this device and dtype."""
    return query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16)


def _kernel(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}  # causal
    if (group := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in _kernel_parameters():
            options["enable_gqa"] = True
        else:  # torch 2.11 and before
            key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
    rows = (states[0].transpose(0, 1) for states in (query, key, value))  # [T,H,d]
    return varlen_attn(*rows, bounds, bounds, longest, longest, **options)[None]  # [1,T,H,d]


AttentionInterface.register(NAME, varlen_attention)


@contextmanager
def packed_rows(language_model: PreTrainedModel) -> Iterator[None]:
    """Let a language model take packed rows; only those without FlashAttention."""
    before = language_model.config._attn_implementation
    if before.startswith("flash_attention"):
        yield
        return
    if before not in ("sdpa", "eager"):
        raise ConfigError(f"attention {before!r} does not take packed rows; use sdpa or flash_attention_2")
    with _attention(language_model, NAME):
        language_model.padded_attention = before
        yield


@contextmanager
def padded_rows(language_model: PreTrainedModel) -> Iterator[None]:
    """Let a language model take padded rows again, within :func:`packed_rows`."""
    now = language_model.config._attn_implementation
    with _attention(language_model, language_model.padded_attention if now == NAME else now):
        yield


@contextmanager
def _attention(language_model: PreTrainedModel, name: str) -> Iterator[None]:
    before = language_model.config._attn_implementation
    if name != before:
        language_model.set_attn_implementation(name)
    try:
        yield
    finally:
        if name != before:
            language_model.set_attn_implementation(before)
