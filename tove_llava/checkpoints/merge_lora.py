"""From a checkpoint with adapters to a whole model without."""

import dataclasses
import os
from pathlib import Path

from tove_llava.checkpoints.loading import load_model
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.checkpoints.saving import save_checkpoint
from tove_llava.core.errors import ConfigError
from tove_llava.core.files import staged
from tove_llava.core.sources import Source
from tove_llava.llava.configuration import ToveLlavaConfig
from tove_llava.tower import ToveVisionConfig


def merge_lora(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    self_contained: bool = False,
) -> Manifest:
    """Writes a model's adapters into its language model's weights: ``W + alpha / r * B A``.

    ``W`` is what the adapters were trained upon: the language model's own weights or, if these were quantised, the
    values that quantisation left of them. CLIP and the experts are named by their sources, as in ``model``.

    Args:
        model: a folder that LoRA or QLoRA training wrote.
        out: the folder to write; it must not exist, or be empty.
        dtype: of the weights, and of the sum; that of the language model in training by default.
        self_contained: write CLIP and the experts as well, as is done where ``model`` has them by value.

    Returns:
        the manifest of the new folder.

    Raises:
        ConfigError: the model has no adapters, or the target is in use.
        CheckpointError: the model cannot be loaded, or the folder cannot be written; nothing is left behind then.
    """
    folder, out = Path(model), Path(os.path.abspath(out))
    manifest = Manifest.read(folder)
    if manifest.kind != "lora":
        raise ConfigError(f"{folder} has no LoRA adapters to merge: it is a checkpoint of kind {manifest.kind!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; give --out a new folder, or remove that one")
    loaded, processor = load_model(folder, dtype=dtype, merge_lora=True, load_backbones=False)
    if self_contained or _has_own_sources(loaded.config, folder):
        loaded.tower.load_backbones(loaded.config.vision_config.expert_names, base_dir=folder)
        self_contained = True
    source = Source.parse(manifest.language["source"]).resolve(folder)
    language = manifest.language | {"source": str(source.absolute()), "dtype": dtype or manifest.language["dtype"]}
    final = dataclasses.replace(manifest, kind="full", language=language, quantization=None)
    with staged(out) as stage:
        tensors = {name: parameter.data for name, parameter in loaded.named_parameters()}
        save_checkpoint(stage, loaded, processor, final, tensors, self_contained=self_contained)
    return Manifest.read(out)


def _has_own_sources(config: ToveLlavaConfig, folder: Path) -> bool:
    """Whether CLIP or an expert lies inside the checkpoint."""
    vision: ToveVisionConfig = config.vision_config
    sources = [vision.clip_source, *(spec.source for spec in vision.expert_specs)]
    return any(Source.parse(s) != Source.parse(s).resolve(folder) for s in sources if s)
