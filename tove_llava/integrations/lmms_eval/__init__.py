"""The model in lmms-eval: ``lmms-eval --model tove_llava --model_args pretrained=DIR``.

lmms-eval finds it by the entry point ``lmms_eval.models`` of the installed package.
"""

from typing import Any


def manifest() -> Any:
    """Return lmms-eval's registry entry, which imports the model on use."""
    from lmms_eval.models.registry_v2 import ModelManifest

    model = f"{__name__}.model"
    return ModelManifest("tove_llava", f"{model}.ToveLlavaSimple", f"{model}.ToveLlavaChat")
