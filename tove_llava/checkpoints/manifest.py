"""The manifest of a checkpoint folder, written last to mark completeness."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object, write_atomically
from tove_llava.core.mappings import from_mapping
from tove_llava.core.paths import check_folder, refuse_pickles
from tove_llava.core.sources import Source
from tove_llava.presets import LanguagePreset, QuantizationPreset

MANIFEST = "tove_llava.json"
TRAINED = "trained.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_PREFIX = "base_model.model."  # peft's; PeftModel.from_pretrained then reads the adapter too
KINDS = ("trained", "lora", "full")
VERSION = 1


@dataclass(frozen=True)
class PluginEntry:
    """A plugin that defines parts of the model (:mod:`tove_llava.checkpoints.plugin_records`)."""

    name: str  # of the file or the distribution
    version: str  # SHA-256 of the file, or the distribution's version
    file: bool
    parts: dict[str, list[str]]  # names by kind, such as {"fusion": ["cross_attention"]}


@dataclass(frozen=True)
class Manifest:
    """A checkpoint folder's kind, and what belongs to it."""

    kind: str
    stage: str
    preset: str
    template: str
    image_aspect_ratio: str
    model_max_length: int
    language: dict[str, Any]  # LanguagePreset
    fingerprint: str = ""  # SHA-256 of the trained weights
    language_fingerprint: str = ""  # of the language model named by its source, in its dtype; "" if not recorded
    quantization: dict[str, Any] | None = None  # QuantizationPreset that the language model was trained under
    history: list[dict[str, Any]] = field(default_factory=list)  # data and recipe of each stage, for the model card
    plugins: list[PluginEntry] = field(default_factory=list)
    format_version: int = VERSION

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Manifest":
        """Read a folder's manifest.

        Raises:
            CheckpointError: the folder is not a complete checkpoint.
        """
        path = Path(folder)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder; give the output folder of a training run")
        check_folder(path)
        file = path / MANIFEST
        if not file.is_file():
            from tove_llava.checkpoints.base import foreign_format

            foreign = foreign_format(path)
            if foreign is not None:
                raise CheckpointError(
                    f"{path} is a LLaVA checkpoint of the format {foreign}; make one of this package's of it: "
                    f"tove-llava convert --model {path} --out NEW_FOLDER"
                )
            refuse_pickles(path)
            if any(path.glob("*checkpoint-*")):
                raise CheckpointError(f"{path} holds an unfinished run; run its command again, which resumes it")
            raise CheckpointError(
                f"{path} is not a complete ToVE-LLaVA checkpoint: it has no {MANIFEST}, which is written last"
            )
        try:
            manifest = from_mapping(cls, read_json_object(file), "the manifest")
            manifest.language.setdefault("dtype", "float32")
            from_mapping(LanguagePreset, manifest.language, "language")
            Source.parse(manifest.language["source"])
            _ = manifest.trained_quantization
        except ConfigError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
        if manifest.format_version > VERSION or manifest.kind not in KINDS:
            raise CheckpointError(f"{file} comes from a newer version of tove_llava; update the package")
        if manifest.image_aspect_ratio not in ("pad", "square") or manifest.model_max_length < 1:
            raise CheckpointError(f"{file}: image_aspect_ratio or model_max_length is impossible; the file is damaged")
        return manifest

    @property
    def trained_quantization(self) -> QuantizationPreset | None:
        """Return the quantisation under which this checkpoint's parts were trained."""
        return (
            None if self.quantization is None else from_mapping(QuantizationPreset, self.quantization, "quantization")
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make a folder a complete checkpoint; call it last."""
    content = dataclasses.asdict(manifest)
    if not manifest.plugins:
        del content["plugins"]  # older versions of this package refuse the key
    write_atomically(folder / MANIFEST, json.dumps(content, indent=2) + "\n")
