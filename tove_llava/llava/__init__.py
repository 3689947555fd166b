"""LLaVA with a ToVE tower, registered on import with transformers' Auto classes."""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForImageTextToText

from tove_llava.llava.configuration import ToveLlavaConfig
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration, ToveLlavaOutput, VisionInputs

if TYPE_CHECKING:
    from tove_llava.llava.build import build_model

ToveLlavaForConditionalGeneration.folders = "tove_llava.checkpoints.folders"
AutoConfig.register("tove_llava", ToveLlavaConfig)
AutoModelForImageTextToText.register(ToveLlavaConfig, ToveLlavaForConditionalGeneration)

__all__ = [
    "ToveLlavaConfig",
    "ToveLlavaForConditionalGeneration",
    "ToveLlavaOutput",
    "VisionInputs",
    "build_model",
]

_HOME_OF = {"build_model": "tove_llava.llava.build"}


def __getattr__(
    name: str,
) -> Any:
    # On first use: these import presets, processors and peft, which the model does not need.
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
