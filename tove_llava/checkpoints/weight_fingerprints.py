"""Digests that tell one model's weights from another's."""

import hashlib
from collections.abc import Mapping

import torch


def exact_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sampled_fingerprint(model: torch.nn.Module) -> str:
    """Return a short digest of a model's weights; see :func:`sampled_digest`."""
    return sampled_digest(model.state_dict())


def sampled_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a short digest of each tensor's name, shape and some values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        step = max(1, len(flat) // 64)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
