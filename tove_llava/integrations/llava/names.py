"""Values of ``--vision_tower``: ``tove:<preset>``, ``tove:<preset file>.yaml`` or ``tove:<checkpoint folder>``."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

import tove_llava.llava  # noqa: F401 - its configuration must be known to AutoConfig
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.finite import check_finite
from tove_llava.core.safe_loading import from_pretrained
from tove_llava.core.sources import Source
from tove_llava.presets import load_preset, preset_names
from tove_llava.tower import ToveVisionConfig, ToveVisionModel

PREFIX = "tove:"
_PRESET_FILES = (".yaml", ".yml")


def is_ours(name: str) -> bool:
    """Tell if a value of ``--vision_tower`` names a tower of this package."""
    return name.startswith(PREFIX)


@dataclass(frozen=True)
class TowerName:
    """A parsed name."""

    target: str  # the text after "tove:"
    folder: Path | None = None  # the checkpoint folder, or None for a preset

    @classmethod
    def parse(cls, name: str) -> "TowerName":
        """Parse a name; a folder has a slash (``./folder``), a preset none."""
        target = name.removeprefix(PREFIX)
        if Path(target).suffix in _PRESET_FILES or "/" not in target:
            return cls(target)
        return cls(target, Path(target).expanduser())

    def config(self) -> ToveVisionConfig:
        """Return the tower's configuration; reads no weights.

        Raises:
            ConfigError: no such preset, or a wrong key in it.
            CheckpointError: the folder, or a source that the preset names, is not there or holds something else.
        """
        if self.folder is not None:
            return _folder_config(self.folder)
        from tove_llava.llava.build import vision_config  # imports language models, which a folder does not need

        if Path(self.target).suffix not in _PRESET_FILES and self.target not in preset_names():
            raise ConfigError(
                f"--vision_tower {PREFIX}{self.target}: no such preset; there are {', '.join(preset_names())}. "
                f"A preset of your own is a .yaml file, a folder is written with a slash: {PREFIX}./{self.target}"
            )
        return vision_config(load_preset(self.target).vision)

    def fill(self, tower: ToveVisionModel) -> None:
        """Load the trained parts into a tower; nothing for a preset.

        Raises:
            CheckpointError: the folder's weights are damaged or of another tower.
        """
        if self.folder is None:
            return
        parts, tensors = tower.state_dict(), _trained_parts(self.folder)
        wrong = sorted(
            name
            for name in parts.keys() | tensors.keys()
            if name not in parts or name not in tensors or parts[name].shape != tensors[name].shape
        )
        if wrong:
            raise CheckpointError(
                f"{self.folder}: the weights are not those of the tower that its config.json describes; missing, "
                f"unknown or of another shape: {', '.join(wrong[:4])}"
            )
        tower.load_state_dict(tensors)


def _folder_config(folder: Path) -> ToveVisionConfig:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"--vision_tower {PREFIX}{folder}: there is no {folder}/config.json")
    config = from_pretrained(AutoConfig, folder, "config.json")
    config = getattr(config, "vision_config", config)
    if not isinstance(config, ToveVisionConfig):
        raise CheckpointError(
            f"{folder} is a {config.model_type!r} checkpoint, without a ToVE tower; name the folder of one"
        )
    # Resolved, so that they can still be found from the folders of later stages.
    config.clip_source = str(Source.parse(config.clip_source).resolve(folder))
    for expert in config.experts:
        expert["source"] = str(Source.parse(expert["source"]).resolve(folder))
    return config


def _trained_parts(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tower's parameters from any model folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - not a mapping
                    _, inside, rest = f".{key}".rpartition("vision_tower.")
                    if inside or key.startswith("fusion."):
                        found[rest if inside else key] = weights.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
    check_finite(found.items(), folder)
    return found
