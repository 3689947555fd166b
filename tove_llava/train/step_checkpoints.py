"""Write the checkpoints inside a run atomically, and read them."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tove_llava.core.errors import CheckpointError
from tove_llava.core.files import sync
from tove_llava.core.finite import check_finite
from tove_llava.core.safe_loading import loading
from tove_llava.train.run_files import complete, incomplete
from tove_llava.train.stages import Trainable

WEIGHTS = "trained.safetensors"
METER = "meter.json"


def gather(trainable: Trainable, is_writer: bool) -> dict[str, torch.Tensor]:
    """Return the trainable parameters on the writer. Every rank calls this."""
    tensors: dict[str, torch.Tensor] = {}
    for part in trainable.parts.values():
        for name, parameter in part.items():
            with _whole(parameter):
                if is_writer:
                    tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return tensors


def _whole(parameter: torch.nn.Parameter) -> Any:
    if not hasattr(parameter, "ds_id"):  # set by DeepSpeed on the parameters that ZeRO-3 partitions
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def save_weights(file: Path, trainable: Trainable, is_writer: bool) -> None:
    """Write the trainable parameters. Every rank calls this."""
    tensors = gather(trainable, is_writer)
    if is_writer:
        save_file(tensors, file)


def load_weights(file: Path, trainable: Trainable) -> None:
    """Load saved parameters.

    Raises:
        CheckpointError: the file is missing or damaged, or its names or shapes are those of another stage or tower.
    """
    if not file.is_file():
        raise CheckpointError(
            f"{file} does not exist; the checkpoint is incomplete. Remove its folder to start without it"
        )
    with loading("the parameters", file):
        tensors = load_file(file)
    check_finite(tensors.items(), file)
    parameters = {name: p for part in trainable.parts.values() for name, p in part.items()}
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())
        raise CheckpointError(f"{file} belongs to another stage or tower: {len(odd)} names differ, such as {odd[:3]}")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"{file}: {name} has shape {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}"
            )
        parameter.data.copy_(tensors[name])


def publish(staging: Path, final: Path, keep: int | None) -> None:
    """Publish a staged checkpoint, then remove those that it supersedes.

    Its files reach the disk before its name does. An interruption at any point leaves a complete checkpoint.
    """
    for path in sorted(staging.rglob("*")):
        sync(path)
    sync(staging)
    if final.exists():
        shutil.rmtree(final)
    os.rename(staging, final)
    sync(final.parent)
    prune(final.parent, keep)


def prune(run: Path, keep: int | None) -> None:
    """Remove all but the newest ``keep`` checkpoints (None: no complete one)."""
    for path in [*(complete(run)[:-keep] if keep else []), *incomplete(run)]:
        shutil.rmtree(path, ignore_errors=True)
