"""``tove``: this package's own checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from tove_llava.checkpoints.assemble import LANGUAGE_PATH, PROJECTOR_PATH, assemble_model, load_language, tower_config
from tove_llava.checkpoints.base import OWN, LlavaFormat, Request, register_format
from tove_llava.checkpoints.clip import read_clip, save_clip
from tove_llava.checkpoints.exports import ExportSource
from tove_llava.checkpoints.loading import load_model, load_processor, read_config, trained_names
from tove_llava.checkpoints.manifest import ADAPTER, ADAPTER_CONFIG, ADAPTER_PREFIX, MANIFEST, TRAINED, Manifest
from tove_llava.checkpoints.parts import (
    AdapterPart,
    ClipPart,
    LanguagePart,
    LlavaParts,
)
from tove_llava.checkpoints.saving import save_checkpoint
from tove_llava.checkpoints.tensors import Tensors, file_tensors, folder_tensors, split_by_prefix, write_json
from tove_llava.checkpoints.tokenizer_files import read_tokenizer, write_tokenizer
from tove_llava.checkpoints.weight_fingerprints import check_stored, sampled_fingerprint
from tove_llava.core.errors import ConfigError
from tove_llava.core.sources import BundledSource, Source
from tove_llava.presets import LanguagePreset, Preset
from tove_llava.tower import ToveVisionConfig, ToveVisionModel, TowerFeatures

CLIP_FOLDER, LANGUAGE_FOLDER = "backbones/clip", "language"

_FULL = (
    (LANGUAGE_PATH, "language", "model."),
    ("lm_head.", "language", "lm_head."),
    (PROJECTOR_PATH, "projector", ""),
)


@register_format("tove")
class Tove(LlavaFormat):
    """A folder that ``tove-llava train`` writes."""

    summary = "this package's own: to evaluate, to chat with, or, with --preset, to train from"
    honours = ("base", "clip", "template", "preset")

    def detect(self, folder: Path, config: dict[str, Any]) -> bool:
        return (folder / MANIFEST).is_file() or config.get("model_type") == "tove_llava"

    def read(self, folder: Path, request: Request) -> LlavaParts:
        manifest = Manifest.read(folder)
        if request.base is not None or request.clip is not None:
            raise ConfigError(f"{folder} names its own language model and CLIP; leave --base and --clip out")
        config = read_config(folder)
        _check_tower(config.vision_config, folder)
        processor = load_processor(folder)
        tokenizer = processor.tokenizer
        if manifest.kind == "full":
            found = split_by_prefix(folder_tensors(folder), _FULL, folder)
            projector = found["projector"]
            language = LanguagePart.by_value(folder, found["language"], config.text_config)
            base = Source.parse(manifest.language["source"]).resolve(folder).path
            language.tokenizer_folders = [*([base] if base is not None else []), folder]
        else:
            language = _language(folder, manifest)
            if language.tensors is not None:
                tokenizer = read_tokenizer(language, language.tokenizer_folders[0])  # its own, image token or not
            stored = file_tensors(folder / TRAINED)
            projector = split_by_prefix(stored, [(PROJECTOR_PATH, "projector", "")], folder)["projector"]
        check_stored(folder, manifest)
        return LlavaParts(
            folder=folder,
            language=language,
            projector=projector,
            clip=_clip(config.vision_config, folder),
            tokenizer=tokenizer,
            template=request.template or manifest.template,
            image_aspect_ratio=manifest.image_aspect_ratio,
            image_token=processor.image_token,
            projector_act=config.projector_hidden_act,
            model_max_length=manifest.model_max_length,
            adapter=_adapter(folder) if manifest.kind == "lora" else None,
        )

    def write(self, parts: LlavaParts, folder: Path, request: Request) -> None:
        preset: Preset | None = request.preset
        source = None
        if parts.clip.tensors is not None:
            source = f"hf:./{CLIP_FOLDER}"
            save_clip(parts.clip, folder / CLIP_FOLDER)
        vision = tower_config(parts.clip, parts.folder, preset, source)
        asked = LanguagePreset("") if preset is None else preset.language
        dtype = parts.language.dtype if preset is None else preset.language.dtype
        entry = LanguagePreset(
            source=parts.language.source or f"hf:./{LANGUAGE_FOLDER}",
            revision=parts.language.revision,
            dtype=dtype,
            attention=asked.attention,
            image_token=parts.image_token,
        )
        if parts.language.tensors is not None:
            _write_language(parts, folder / LANGUAGE_FOLDER)
        language = load_language(parts.language, dtype, asked.attention)
        digest = sampled_fingerprint(language)
        model, processor = assemble_model(parts, vision, language)
        manifest = Manifest(
            kind="trained" if parts.adapter is None else "lora",
            stage="converted",
            preset=parts.folder.name if preset is None else preset.name,
            template=parts.template,
            image_aspect_ratio=parts.image_aspect_ratio,
            model_max_length=parts.model_max_length,
            language=dataclasses.asdict(entry),
            language_fingerprint=digest,
        )
        save_checkpoint(folder, model, processor, manifest, _trained(parts, model), in_place=True)
        if not _starts_as_clip(model.tower):
            parts.remarks.append(
                f"With fusion {vision.fusion!r} the tower's tokens are not CLIP's at first, so the answers are not the "
                "checkpoint's before it is trained."
            )


class MergedAdapters(LlavaFormat):
    """This package's own folder, written as a whole model without adapters."""

    name = OWN
    honours = ("dtype", "self_contained")

    def open(self, folder: Path, request: Request) -> ExportSource:
        manifest = Manifest.read(folder)
        if manifest.kind != "lora":
            raise ConfigError(f"{folder} has no LoRA adapters to merge: it is a checkpoint of kind {manifest.kind!r}")
        model, processor = load_model(folder, dtype=request.dtype, merge_lora=True, load_backbones=False)
        if request.self_contained or model.tower.config.lies_in_checkpoint:
            model.tower.load_backbones(model.tower.config.expert_names, base_dir=folder)
        source = str(Source.parse(manifest.language["source"]).resolve(folder).absolute())
        language = manifest.language | {"source": source, "dtype": request.dtype or manifest.language["dtype"]}
        final = dataclasses.replace(manifest, kind="full", language=language, quantization=None)
        return ExportSource(folder, model, processor, final)

    def write(self, source: ExportSource, folder: Path, request: Request) -> None:
        model, by_value = source.model, source.model.tower.is_loaded
        tensors = {name: parameter.data for name, parameter in model.named_parameters()}
        save_checkpoint(folder, model, source.processor, source.manifest, tensors, self_contained=by_value)


@torch.no_grad()
def _starts_as_clip(tower: ToveVisionModel) -> bool:
    """Return whether the fusion returns CLIP's tokens, for random features."""
    config, generator = tower.config, torch.Generator().manual_seed(0)
    specs = {spec.name: (1, spec.width, *spec.grid) for spec in config.expert_specs}
    shapes = {"": (1, config.num_patches, config.clip_width), **(specs if tower.fusion.uses_experts else {})}
    drawn = {name: torch.randn(shape, generator=generator).to(tower.dtype) for name, shape in shapes.items()}
    base = drawn.pop("")
    return torch.equal(tower.eval().fuse(TowerFeatures(base=base, experts=drawn)).last_hidden_state, base)


def _trained(parts: LlavaParts, model: Any) -> Tensors:
    """Collect what the checkpoint stores: parts' tensors and new tower tensors."""
    parameters = dict(model.named_parameters())
    stored = {name: parameters[name].detach() for name in trained_names(model)}
    stored |= {PROJECTOR_PATH + name: value.contiguous() for name, value in parts.projector.items()}
    for name, value in (parts.adapter.tensors if parts.adapter is not None else {}).items():
        layer, _, last = (LANGUAGE_PATH + name.removeprefix("model.")).rpartition(".")
        stored[f"{layer}.default.{last}"] = value.contiguous()
    return stored


def _write_language(parts: LlavaParts, folder: Path) -> None:
    """Write the language model as a folder, only with its own tokens."""
    language = parts.language
    assert language.tensors is not None
    folder.mkdir()
    save_torch_state_dict(language.tensors, folder)
    config = type(language.config).from_dict(language.config.to_dict())
    config.dtype = language.dtype
    config.save_pretrained(folder)
    if language.generation is not None:
        write_json(folder / "generation_config.json", language.generation)
    write_tokenizer(parts, folder)


def _check_tower(vision: ToveVisionConfig, folder: Path) -> None:
    """Raise ConfigError for a tower that is more than CLIP."""
    if vision.fusion != "none":
        raise ConfigError(
            f"{folder}: the tower has fusion {vision.fusion!r} with {', '.join(vision.expert_names) or 'no experts'}; "
            "other formats hold only CLIP. Merge the experts into CLIP (tove-llava merge) or take all of them out "
            "(tove-llava detach), and convert that"
        )
    if vision.image_size != vision.clip_config.image_size:
        raise ConfigError(
            f"{folder}: the tower reduces images of {vision.image_size} pixels to CLIP's "
            f"{vision.clip_config.image_size}, which other formats cannot say"
        )


def _language(folder: Path, manifest: Manifest) -> LanguagePart:
    """Return the manifest's language model: by value where the checkpoint holds it."""
    entry = manifest.language
    source = Source.parse(entry["source"])
    inside = source.resolve(folder)
    if source.path is None or inside == source:
        return LanguagePart.by_reference(str(source), entry.get("revision"), entry.get("dtype"))
    place = inside.require()
    return LanguagePart.by_value(place, folder_tensors(place), LanguagePart.by_reference(str(inside)).config)


def _clip(vision: ToveVisionConfig, folder: Path) -> ClipPart:
    """Return CLIP, by value if the checkpoint or package holds it."""
    source = Source.parse(vision.clip_source)
    inside = source.resolve(folder)
    means = {"image_mean": list(vision.image_mean), "image_std": list(vision.image_std)}
    if inside != source or isinstance(source, BundledSource):
        return dataclasses.replace(read_clip(inside.require(), vision.num_clip_layers), normalisation=means)
    return ClipPart(
        config=vision.clip_config,
        layer=vision.clip_layer,
        source=str(source),
        revision=vision.clip_revision,
        normalisation=means,
    )


def _adapter(folder: Path) -> AdapterPart:
    stored = file_tensors(folder / ADAPTER).items()
    tensors = {"model." + name.removeprefix(ADAPTER_PREFIX + LANGUAGE_PATH): value for name, value in stored}
    return AdapterPart.read(folder / ADAPTER_CONFIG, tensors, "merge them first (tove-llava merge-lora)")
