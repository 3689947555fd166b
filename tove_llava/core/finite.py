"""Notice weights that hold NaN or infinity when they are loaded."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tove_llava.core.errors import CheckpointError


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str | os.PathLike[str]) -> None:
    """Raise CheckpointError for a tensor that holds NaN or infinity.

    Args:
        tensors: by name, such as a module's ``named_parameters()``.
        where: the file, folder or source that they are from. In a folder the message names the file.
    """
    for name, tensor in tensors:
        if not _is_finite(tensor):
            file, name = _in_folder(Path(where)) or (where, name)
            raise CheckpointError(
                f"{file}: the tensor {name!r} holds NaN or infinity; copy the file again, or take an earlier checkpoint"
            )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()  # aminmax knows no float8
    # Thirty times as fast as torch.isfinite on the CPU. NaN is passed on.
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def _in_folder(folder: Path) -> tuple[Path, str] | None:
    """Return the file in a folder that holds such a tensor, and its name there."""
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            with safe_open(file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - no mapping
                    if not _is_finite(handle.get_tensor(name)):
                        return file, name
        except (SafetensorError, OSError):
            continue
    return None
