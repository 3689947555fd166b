"""Resize and normalise a tower's pixels for an expert, on the device."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def unnormalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation of [B,3,H,W]; return float32 in 0..1."""
    scale, shift = _affine(tuple(mean), tuple(std), True, pixels.device)
    return torch.addcmul(shift, pixels.float(), scale).clamp_(0, 1)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise [B,3,H,W] in 0..1, in float32."""
    scale, shift = _affine(tuple(mean), tuple(std), False, pixels.device)
    return torch.addcmul(shift, pixels, scale)


def resize(pixels: Tensor, size: int, interpolation: str) -> Tensor:
    """Resize [B,3,H,W] in 0..1 to float32 [B,3,size,size], antialiased, unless it fits."""
    x = pixels.float()  # antialiased interpolation has no bfloat16 kernel on the CPU, and resizing needs the precision
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode=interpolation, align_corners=False, antialias=True).clamp_(0, 1)


@lru_cache(maxsize=64)  # without it each call would copy from host to device and wait
def _affine(mean: tuple[float, ...], std: tuple[float, ...], undo: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift [1,3,1,1] of a normalisation, or of its inverse."""
    scale = std if undo else [1 / s for s in std]
    shift = mean if undo else [-m / s for m, s in zip(mean, std, strict=True)]
    with torch.inference_mode(False):  # a cached tensor must be usable outside inference mode too
        return (
            torch.tensor(scale, dtype=torch.float32, device=device).view(1, 3, 1, 1),
            torch.tensor(shift, dtype=torch.float32, device=device).view(1, 3, 1, 1),
        )
