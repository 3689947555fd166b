"""Triton kernels of :mod:`tove_llava.tower.fused`. Importing this module needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

_ROWS, _COLUMNS = 16, 128  # of a block; a program's registers hold one block of every intermediate


@triton.jit
def _forward_kernel(hidden, gates, out, rows, columns, experts: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.program_id(1) * C + tl.arange(0, C)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    at = r.to(tl.int64)[:, None] * columns + c[None, :]
    total = tl.zeros((R, C), dtype=tl.float32)
    for k in tl.static_range(experts):
        z = tl.load(hidden[k] + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gates + r * experts + k, mask=r < rows, other=0.0)
        total += gate[:, None] * (0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476)))
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    hidden, gates, grad, d_hidden, d_gates, rows, columns, experts: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    for k in tl.static_range(experts):
        gate = tl.load(gates + r * experts + k, mask=r < rows, other=0.0)
        d_gate = tl.zeros((R,), dtype=tl.float32)
        for start in range(0, columns, C):
            c = start + tl.arange(0, C)
            inside = (r < rows)[:, None] & (c < columns)[None, :]
            at = r.to(tl.int64)[:, None] * columns + c[None, :]
            z = tl.load(hidden[k] + at, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            normal = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))  # the normal distribution up to z
            density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
            d_gate += tl.sum(g * z * normal, axis=1)
            d_z = g * gate[:, None] * (normal + z * density)
            tl.store(d_hidden[k] + at, d_z.to(d_hidden[k].dtype.element_ty), mask=inside)
        tl.store(d_gates + r * experts + k, d_gate, mask=r < rows)


def forward(hidden: Sequence[torch.Tensor], gates: torch.Tensor) -> torch.Tensor:
    """Map K contiguous ``[R,m]`` and ``[R,K]`` float32 to ``[R,m]``."""
    rows, columns = hidden[0].shape
    out = torch.empty_like(hidden[0])
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    _launch(_forward_kernel, grid, tuple(hidden), gates, out, rows, columns, len(hidden))
    return out


def backward(
    hidden: Sequence[torch.Tensor], gates: torch.Tensor, grad: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Compute the gradients of the K ``hidden`` and of ``gates``."""
    rows, columns = hidden[0].shape
    d_hidden, d_gates = tuple(torch.empty_like(z) for z in hidden), torch.empty_like(gates)
    grid = (triton.cdiv(rows, _ROWS),)
    _launch(_backward_kernel, grid, tuple(hidden), gates, grad, d_hidden, d_gates, rows, columns, len(hidden))
    return d_hidden, d_gates


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any) -> None:
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):  # Triton launches on the current device
            kernel[grid](*args, _ROWS, _COLUMNS)
    else:  # Triton's interpreter
        kernel[grid](*args, _ROWS, _COLUMNS)
