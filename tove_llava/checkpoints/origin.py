"""Remember the checkpoint that a model was loaded from, for saving."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tove_llava.checkpoints.weight_fingerprints import sampled_digest
from tove_llava.core.sources import Source
from tove_llava.llava.adapters import adapter_parameters

if TYPE_CHECKING:
    from tove_llava.checkpoints.manifest import Manifest
    from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a model was loaded from.

    Attributes:
        folder: the checkpoint's; it may no longer exist.
        manifest: its manifest, with the language model's source as an absolute path.
        holds_language: the language model's source lies in the folder.
        language: digest of the language model as loaded, without adapters; "" if it is saved whole or was unreadable.
    """

    folder: Path
    manifest: Manifest
    holds_language: bool
    language: str

    @classmethod
    def of(cls, model: ToveLlavaForConditionalGeneration, folder: Path, manifest: Manifest) -> Origin:
        """Return the origin of a model that was just loaded from ``folder``."""
        source = Source.parse(manifest.language["source"])
        resolved = str(source.resolve(folder).absolute())
        return cls(
            folder=folder.absolute(),
            manifest=dataclasses.replace(manifest, language=manifest.language | {"source": resolved}),
            holds_language=source.is_relative,
            language="" if manifest.kind == "full" else language_digest(model),
        )


def language_digest(model: ToveLlavaForConditionalGeneration) -> str:
    """Return the language model's digest without adapters; "" for offloaded weights."""
    config = (getattr(model, "peft_config", None) or {}).get("default")
    adapters = {id(p) for p in adapter_parameters(model.model.language_model, config.bias)} if config else set()
    tensors: dict[str, Any] = {}
    for part in (model.model.language_model, model.lm_head):
        for name, parameter in part.named_parameters():
            if parameter.is_meta:
                return ""
            if id(parameter) not in adapters:
                plain = ".".join(word for word in name.split(".") if word != "base_layer")  # as if it had no adapters
                tensors[f"{type(part).__name__}.{plain}:{parameter.dtype}"] = parameter
    return sampled_digest(tensors)
