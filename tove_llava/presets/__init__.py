"""Keep presets as YAML files, and read them."""

from tove_llava.presets.preset import (  # noqa: F401
    LanguagePreset,
    LoraPreset,
    MergePreset,
    Preset,
    ProjectorPreset,
    QuantizationPreset,
    StagePreset,
    VisionPreset,
    dump_preset,
    load_preset,
    preset_names,
)  # fmt: skip
