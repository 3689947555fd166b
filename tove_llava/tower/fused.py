"""The gate's weighted sum ``sum_k G_k * GELU(z_k)``, in one GPU kernel.

In plain torch each of the K products and sums reads and writes a whole ``[R,m]`` tensor, and autograd keeps two of them
per expert. Here the rows are read once, summed in float32 and written once, and the backward pass only needs ``z_k``
and ``G``. The input is activations: the linear layers before them stay modules, so that ZeRO-3 gathers their weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_EXPERTS = 8
_KERNELS = "tove_llava.tower.fused_kernels"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gated_gelu_sum(hidden: Sequence[Tensor], gates: Tensor, *, fused: bool = False) -> Tensor:
    """Compute ``sum_k gates[:, k] * GELU(hidden[k])``.

    Args:
        hidden: K tensors ``[R,m]``: linear layers' outputs before their GELU.
        gates: ``[R,K]`` float32.
        fused: use one kernel, if :func:`supports_fused`.

    Returns:
        ``[R,m]`` in the dtype of ``hidden``.
    """
    if fused and supports_fused(hidden, gates):
        return _Fused.apply(gates.contiguous(), *(z.contiguous() for z in hidden))
    mixed: Tensor | None = None
    for k, z in enumerate(hidden):
        part = gates[:, k, None].to(z.dtype) * F.gelu(z)
        mixed = part if mixed is None else mixed + part
    assert mixed is not None
    return mixed


def supports_fused(hidden: Sequence[Tensor], gates: Tensor) -> bool:
    """Tell if the kernel can run; ``torch.compile`` fuses the plain form itself."""
    first = hidden[0]
    return (
        first.is_cuda
        and gates.device == first.device
        and len(hidden) <= MAX_EXPERTS
        and first.dtype in _DTYPES
        and first.numel() > 0
        and all(z.dtype == first.dtype and z.shape == first.shape and z.device == first.device for z in hidden)
        and not torch.compiler.is_compiling()
        and _kernels() is not None
    )


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """Import the kernels; None without Triton or in an exported model."""
    try:
        return importlib.import_module(_KERNELS)
    except ImportError:
        return None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, *hidden: Tensor) -> Tensor:
        ctx.save_for_backward(gates, *hidden)
        return _kernels().forward(hidden, gates)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        gates, *hidden = ctx.saved_tensors
        d_hidden, d_gates = _kernels().backward(hidden, gates, grad.contiguous())
        return (d_gates, *d_hidden)
