"""The provenance of a result."""

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
    """Return the model and its fingerprint, versions, the command, device and dtype."""
    return {
        "model": os.fspath(model),
        "fingerprint": model_fingerprint(answerer, model),
        "versions": versions(),
        "command": sys.argv,
        "device": str(answerer.device),
        "dtype": str(answerer.model.dtype).removeprefix("torch."),
    }


def model_fingerprint(answerer: Answerer, model: str | Path) -> str:
    """Fingerprint a checkpoint's trained weights, or a stock LLaVA's weights."""
    if (Path(model) / MANIFEST).exists():
        return Manifest.read(model).fingerprint
    return sampled_fingerprint(answerer.model)


def versions() -> dict[str, str]:
    """Return the versions of software that the numbers depend on."""
    return {
        "tove_llava": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
