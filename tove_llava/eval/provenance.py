"""Where a result comes from: the model, its weights' fingerprint, versions, command, device and dtype."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from tove_llava.checkpoints.manifest import MANIFEST, Manifest
from tove_llava.checkpoints.weight_fingerprints import sampled_fingerprint
from tove_llava.core.version import __version__
from tove_llava.inference.generation import Answerer


def provenance(answerer: Answerer, model: str | Path) -> dict[str, Any]:
    """What a result belongs to: the model and its fingerprint, versions, the command, device and dtype."""
    return {
        "model": os.fspath(model),
        "fingerprint": model_fingerprint(answerer, model),
        "versions": versions(),
        "command": sys.argv,
        "device": str(answerer.device),
        "dtype": str(answerer.model.dtype).removeprefix("torch."),
    }


def model_fingerprint(answerer: Answerer, model: str | Path) -> str:
    """That of the checkpoint's trained weights; for a stock LLaVA folder, of the loaded weights."""
    if (Path(model) / MANIFEST).exists():
        return Manifest.read(model).fingerprint
    return sampled_fingerprint(answerer.model)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "tove_llava": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
