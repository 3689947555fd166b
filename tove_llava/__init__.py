"""ToVE as a drop-in vision tower for LLaVA.

The public names below are imported on first use, so that ``import tove_llava`` and the command line start quickly.
Importing the tower registers its configuration and model with transformers' Auto classes.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tove_llava.core.version import __version__

if TYPE_CHECKING:
    from tove_llava.checkpoints.conversion import convert_checkpoint
    from tove_llava.checkpoints.loading import load_model, open_llava
    from tove_llava.checkpoints.tower_loading import load_tower
    from tove_llava.core.errors import CheckpointError, ConfigError, DataError, NonFiniteError, ToveError
    from tove_llava.core.plugins import load_plugin
    from tove_llava.data.templates import register_template
    from tove_llava.eval.benchmarks import register_benchmark
    from tove_llava.experts import Expert, ExpertSpec, register_expert
    from tove_llava.llava import (
        ToveLlavaConfig,
        ToveLlavaForConditionalGeneration,
        build_model,
    )
    from tove_llava.presets import load_preset
    from tove_llava.tower import ToveVisionConfig, ToveVisionModel, ToveVisionOutput
    from tove_llava.tower.fusion import register_fusion
    from tove_llava.tower.gate import register_gate

_HOMES = {
    "tove_llava.checkpoints.conversion": ("convert_checkpoint",),
    "tove_llava.checkpoints.loading": ("load_model", "open_llava"),
    "tove_llava.checkpoints.tower_loading": ("load_tower",),
    "tove_llava.core.errors": ("CheckpointError", "ConfigError", "DataError", "NonFiniteError", "ToveError"),
    "tove_llava.core.plugins": ("load_plugin",),
    "tove_llava.data.templates": ("register_template",),
    "tove_llava.eval.benchmarks": ("register_benchmark",),
    "tove_llava.experts": ("Expert", "ExpertSpec", "register_expert"),
    "tove_llava.llava": ("ToveLlavaConfig", "ToveLlavaForConditionalGeneration", "build_model"),
    "tove_llava.presets": ("load_preset",),
    "tove_llava.tower": ("ToveVisionConfig", "ToveVisionModel", "ToveVisionOutput"),
    "tove_llava.tower.fusion": ("register_fusion",),
    "tove_llava.tower.gate": ("register_gate",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Expert",
    "ExpertSpec",
    "NonFiniteError",
    "ToveError",
    "ToveLlavaConfig",
    "ToveLlavaForConditionalGeneration",
    "ToveVisionConfig",
    "ToveVisionModel",
    "ToveVisionOutput",
    "__version__",
    "build_model",
    "convert_checkpoint",
    "load_model",
    "load_plugin",
    "load_preset",
    "load_tower",
    "open_llava",
    "register_benchmark",
    "register_expert",
    "register_fusion",
    "register_gate",
    "register_template",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tove_llava' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value  # the next access finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
