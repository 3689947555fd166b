"""``remote-code``: a model with its experts, code and backbones.

The code is this package's own, made flat (:mod:`tove_llava.checkpoints.flatten`): the modules that this model's fusion
and experts need, and one entry module, to which ``auto_map`` points. The processor is a stock one.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tove_llava.checkpoints import exports
from tove_llava.checkpoints.base import Request, register_format
from tove_llava.checkpoints.card import REMOTE_CODE, described_fusion, part_rows
from tove_llava.checkpoints.flatten import flat_name, flatten_modules, third_party_imports
from tove_llava.core.version import __version__
from tove_llava.experts import ExpertHub
from tove_llava.llava.configuration import ToveLlavaConfig
from tove_llava.tower import Fusion
from tove_llava.tower.gate import Gate

ENTRY = "modeling_tove_llava"
_CONFIG = ("tove_llava.llava.configuration", "ToveLlavaConfig")
_MODEL = ("tove_llava.llava.modeling", "ToveLlavaForConditionalGeneration")
_TOWER_CONFIG = ("tove_llava.tower.tower_config", "ToveVisionConfig")
_TOWER = ("tove_llava.tower.tower_model", "ToveVisionModel")
_CORE = (_CONFIG, _MODEL, _TOWER_CONFIG, _TOWER)


@register_format("remote-code")
class RemoteCode(exports.ExportFormat):
    """A folder that transformers opens with ``trust_remote_code=True``."""

    summary = "a model with its experts, code and backbones included; needs trust_remote_code=True"

    def check(self, config: Any) -> None:
        """Accept every model."""

    def write(self, source: exports.ExportSource, folder: Path, request: Request) -> None:
        model = source.model
        config = ToveLlavaConfig.from_dict(model.config.to_dict())
        # Detached experts too, because the fusion has a column for each.
        model.tower.load_backbones(config.vision_config.expert_names, base_dir=source.folder)
        config.vision_config = model.tower.save_backbones(folder)
        # Another class may read a saved expert than the one that loaded it (timm's for open_clip's).
        files = code_files(model.tower.fusion, ExpertHub(config.vision_config.experts, base_dir=folder))
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        config.conversation_template = source.manifest.template
        config.image_aspect_ratio = source.manifest.image_aspect_ratio
        config.auto_map = {
            "AutoConfig": f"{ENTRY}.{_CONFIG[1]}",
            "AutoModelForImageTextToText": f"{ENTRY}.{_MODEL[1]}",
        }
        exports.without_paths(config)
        exports.without_paths(config.vision_config)
        own = model.config
        model.config = config
        try:
            PreTrainedModel.save_pretrained(model, folder)  # only weights and configuration
        finally:
            model.config = own
        exports.generation_config(source).save_pretrained(folder)
        vision = own.vision_config
        exports.write_processor(source, folder, vision, class_token=False)
        needs = sorted(third_party_imports(files.values()) - {"huggingface_hub", "safetensors", "numpy", "yaml"})
        source.remarks.append(f"The code in this folder imports {', '.join(needs)}.")
        attached = ", ".join(vision.attached_experts) or "none"
        about = (
            f"A LLaVA whose vision tower is ToVE: CLIP's tokens with the knowledge of vision experts (attached: "
            f"{attached}; arXiv 2504.00691), by {described_fusion(vision)}. The modelling code is in this folder, so "
            "transformers asks for `trust_remote_code=True`; the backbones are in `backbones/`. Download or copy the "
            "whole folder and load it from there."
        )
        code = ("code", f"tove_llava {__version__}", "Apache-2.0")
        parts = [*part_rows(vision, source.manifest.language["source"]), code]
        exports.write_export_card(source, folder, about, REMOTE_CODE, parts)


def code_files(fusion: Fusion, hub: ExpertHub) -> dict[str, str]:
    """Collect the sources that a fusion and experts need, by file name."""
    core = flatten_modules([home for home, _ in _CORE])
    parts = {module: name for module, name in _components(fusion, hub).items() if f"{flat_name(module)}.py" not in core}
    return {**core, **flatten_modules(parts), f"{ENTRY}.py": _entry(parts)}


def _components(fusion: Fusion, hub: ExpertHub) -> dict[str, str]:
    """Map modules to classes: the fusion, the experts, and their parts."""
    found: list[type] = [type(fusion), *(type(part) for part in fusion.children() if isinstance(part, Gate))]
    for name in hub.names:
        expert = hub[name].meta_twin()  # its configuration has been read
        found.append(type(expert))
        # For instance a dense network's architecture.
        found += [type(value) for value in vars(expert).values() if type(value).__module__.startswith("tove_llava.")]
    return {cls.__module__: cls.__name__ for cls in sorted(found, key=lambda cls: (cls.__module__, cls.__name__))}


def _entry(parts: dict[str, str]) -> str:
    """Write the one module that ``auto_map`` names, so that classes exist once."""
    named = "\n".join(f"from .{flat_name(home)} import {name}" for home, name in _CORE)
    others = "\n".join(f"from .{flat_name(module)} import {name}  # noqa: F401" for module, name in parts.items())
    return f'''"""ToVE-LLaVA for transformers' trust_remote_code: what config.json's auto_map names.

Written by tove_llava {__version__} from its own sources, which lie next to this file.
"""

from transformers import AutoModel

{named}

# These register the parts that this model is made of.
{others}

# By this class, not by name: another such folder has a tower of its own.
AutoModel.register(ToveVisionConfig, ToveVisionModel, exist_ok=True)

__all__ = ["ToveLlavaConfig", "ToveLlavaForConditionalGeneration", "ToveVisionConfig", "ToveVisionModel"]
'''
