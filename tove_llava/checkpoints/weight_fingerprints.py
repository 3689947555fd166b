"""Digests that tell one model's weights from another's."""

import hashlib
import os
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tove_llava.checkpoints.manifest import ADAPTER, ADAPTER_PREFIX, TRAINED, Manifest
from tove_llava.checkpoints.tensors import Tensors, file_tensors, folder_tensors
from tove_llava.core.errors import CheckpointError
from tove_llava.core.files import read_json_object

ACCEPT = "TOVE_ACCEPT_CHANGED_WEIGHTS"

_MERGED_CLIP = "hf:./clip"

# transformers' save_pretrained writes names of an older layout.
_OLDER = (
    ("model.language_model.model.", "model.language_model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def check_stored(folder: Path, manifest: Manifest) -> None:
    """Raise CheckpointError unless the weights in a folder's files are those that its manifest names.

    It takes about a second for 2 GB. So of several ranks only the first of each node does it.
    """
    start_check(folder, manifest)(None)


def start_check(folder: Path, manifest: Manifest) -> Callable[[Set[str] | None], None]:
    """Start to hash a folder's weights in a thread, for :func:`check_stored` while they are loaded.

    Returns:
        the function that waits and compares, given the names of the model's parameters, if they are known: a whole
        model's files may hold more.
    """
    if os.environ.get(ACCEPT) == "1" or os.environ.get("LOCAL_RANK", "0") != "0" or not manifest.fingerprint:
        return lambda names: None
    tensors = folder_tensors(folder) if manifest.kind == "full" else file_tensors(folder / TRAINED)
    stored = by_model_names(folder, manifest, tensors)
    pool = ThreadPoolExecutor(1)
    hashed = pool.submit(exact_fingerprint, stored)
    pool.shutdown(wait=False)

    def finish(names: Set[str] | None) -> None:
        if hashed.result() == manifest.fingerprint:
            return
        if names is not None and not names <= stored.keys():
            return  # transformers reports what is missing, or has names of its own
        if _is_merged(folder):
            return
        if names is None or exact_fingerprint({name: stored[name] for name in names}) != manifest.fingerprint:
            raise CheckpointError(
                f"{folder}: the weights are not those that its tove_llava.json names by their SHA-256: a file was "
                f"damaged or exchanged. Copy the folder again. If you changed the weights, set {ACCEPT}=1"
            )

    return finish


def _is_merged(folder: Path) -> bool:
    """Tell if a merge wrote the folder; earlier versions hashed the encoder too, which it stores in another form."""
    vision = read_json_object(folder / "config.json").get("vision_config")
    return isinstance(vision, dict) and (vision.get("fusion"), vision.get("clip_source")) == ("none", _MERGED_CLIP)


def by_model_names(folder: Path, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Name trained tensors as the model does, adapters included.

    Args:
        tensors: of ``trained.safetensors``, or the whole model's.
    """
    if manifest.kind == "full":
        return {_newer(name): value for name, value in tensors.items()}
    named = dict(tensors)
    if manifest.kind == "lora":
        for name, value in file_tensors(folder / ADAPTER).items():
            stem, _, last = name.removeprefix(ADAPTER_PREFIX).rpartition(".")
            if last == "lora_magnitude_vector":  # DoRA's, which peft saves without its last name
                stem, last = f"{stem}.{last}", "weight"
            named[f"{stem}.default.{last}" if ".lora_" in stem else f"{stem}.{last}"] = value
    return named


def _newer(name: str) -> str:
    return next((new + name.removeprefix(old) for old, new in _OLDER if name.startswith(old)), name)


def exact_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
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
