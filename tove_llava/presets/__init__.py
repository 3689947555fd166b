"""Presets, as YAML files, and the code that reads them."""

from tove_llava.presets.preset import (
    LanguagePreset,
    LoraPreset,
    MergePreset,
    Preset,
    ProjectorPreset,
    QuantizationPreset,
    StagePreset,
    VisionPreset,
    load_preset,
    preset_names,
)

__all__ = [
    "LanguagePreset",
    "LoraPreset",
    "MergePreset",
    "Preset",
    "ProjectorPreset",
    "QuantizationPreset",
    "StagePreset",
    "VisionPreset",
    "load_preset",
    "preset_names",
]
