"""Write this package's checkpoints: trained parts by value, the rest by reference.

:mod:`tove_llava.checkpoints.loading` describes the folders. The manifest is written last, so an interrupted save is
recognised as incomplete.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import LlavaProcessor

from tove_llava.checkpoints.card import read_scores, write_card
from tove_llava.checkpoints.loading import trained_names
from tove_llava.checkpoints.manifest import ADAPTER, ADAPTER_PREFIX, MANIFEST, TRAINED, Manifest, write_manifest
from tove_llava.checkpoints.origin import Origin, language_digest
from tove_llava.checkpoints.plugin_records import save_plugins
from tove_llava.checkpoints.weight_fingerprints import exact_fingerprint
from tove_llava.core.errors import CheckpointError
from tove_llava.core.licences import known, licence_of, write_origin
from tove_llava.core.sources import Source
from tove_llava.llava.adapters import adapter_layers, adapter_parameters
from tove_llava.llava.build import parameter_names, read_language_model
from tove_llava.llava.configuration import ToveLlavaConfig
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration
from tove_llava.presets import LanguagePreset
from tove_llava.tower import ToveVisionModel


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: ToveLlavaForConditionalGeneration,
    processor: LlavaProcessor | None,
    manifest: Manifest,
    trained: Mapping[str, torch.Tensor],
    *,
    self_contained: bool = False,
    in_place: bool = False,
    scores: Mapping[str, Any] | None = None,
    tags: Iterable[str] = (),
) -> None:
    """Write a checkpoint folder.

    Args:
        folder: may hold other files, which stay.
        processor: None leaves it to the caller to save one.
        manifest: its fingerprint is filled in.
        trained: the stage's trained parameters by their name in ``model``, gathered on the CPU.
        self_contained: also write CLIP, the experts and the language model.
        in_place: ``folder`` already holds what the configuration names by paths inside a checkpoint.
        scores, tags: for the model card; see :func:`tove_llava.checkpoints.card.write_card`.

    Raises:
        CheckpointError: a backbone cannot be saved by value.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    config = ToveLlavaConfig.from_dict(model.config.to_dict())
    config.conversation_template = manifest.template
    config.image_aspect_ratio = manifest.image_aspect_ratio
    language = dict(manifest.language)
    if in_place:
        config.vision_config = model.tower.config
    else:
        config.vision_config, trained = model.tower.save_parts(folder, trained, _tower_prefix(model), self_contained)
    fingerprint = exact_fingerprint(trained)  # of what is stored here; a merged encoder is stored as CLIP
    if self_contained and manifest.kind != "full":
        read_language_model(LanguagePreset(**language)).save_pretrained(folder / "language")
        write_origin(folder / "language", language["source"], known(licence_of(language["source"])))
        language |= {"source": "hf:./language", "revision": None}

    adapters = parameter_names(model, model.model.language_model, model.lm_head) & trained.keys()
    if manifest.kind == "full":
        # The model's own names; save_pretrained would write those of an older layout.
        save_torch_state_dict(dict(trained), folder, metadata={"format": "pt"})
    else:
        save_file({name: value for name, value in trained.items() if name not in adapters}, folder / TRAINED)
    if manifest.kind == "lora":
        _save_adapter(folder, model, {name: trained[name] for name in adapters}, language["source"])
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    # The card names the sources, wherever copies are.
    write_card(folder, model.config.vision_config, manifest, scores=scores, tags=tags)
    plugins = save_plugins(folder, model.config.vision_config, manifest.template)
    write_manifest(folder, dataclasses.replace(manifest, language=language, fingerprint=fingerprint, plugins=plugins))


def save_whole(
    model: ToveLlavaForConditionalGeneration,
    folder: Path,
    write: Callable[..., Any],
    options: dict[str, Any],
    self_contained: bool,
    tags: Iterable[str],
) -> None:
    """Write a loaded model without adapters, by transformers' own ``save_pretrained``."""
    _refuse_remains(folder, (folder / name for name in (TRAINED, ADAPTER, "adapter_config.json")))
    rounded = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if rounded:
        raise CheckpointError(
            f"the language model is held in 4 or 8 bits ({rounded[0]}), which a saved model is not; load it without "
            "quantisation and save that"
        )
    (folder / MANIFEST).unlink(missing_ok=True)
    state = dict(options.pop("state_dict", None) or model.state_dict())
    own = model.config.vision_config
    vision, state = model.tower.save_parts(folder, state, _tower_prefix(model), self_contained)
    if not own.lies_in_checkpoint or vision.lies_in_checkpoint:  # else the caller has saved the backbones there
        model.config.vision_config = vision
    try:
        write(folder, state_dict=state, **options)
    finally:
        model.config.vision_config = own
    if model.origin is None:
        write_card(folder, own, tags=tags)
        return
    weights = _on_cpu(dict(model.named_parameters()))
    old = model.origin.manifest
    manifest = dataclasses.replace(
        old,
        kind="full",
        language=old.language | {"dtype": str(model.dtype).removeprefix("torch.")},
        fingerprint=exact_fingerprint(weights) if weights else "",
        language_fingerprint="",
        quantization=None,
        plugins=save_plugins(folder, own, old.template),
    )
    write_card(folder, own, manifest, scores=_scores(model, weights), tags=tags)
    if self_contained and not Source.parse(manifest.language["source"]).is_portable:
        manifest.language["source"] = f"hf:./{Path(old.language['source']).name}"  # no path on this machine
    write_manifest(folder, manifest)


def save_adapted(
    model: ToveLlavaForConditionalGeneration, folder: Path, self_contained: bool, tags: Iterable[str]
) -> None:
    """Write adapters, projector and tower; name the language model by source."""
    _refuse_remains(folder, folder.glob("model*.safetensors"))
    origin = _origin_of_adapted(model)
    bias = model.peft_config["default"].bias
    adapters = {id(p) for p in adapter_parameters(model.model.language_model, bias)}
    names = trained_names(model) | {name for name, p in model.named_parameters() if id(p) in adapters}
    trained = _on_cpu({name: p for name, p in model.named_parameters() if name in names})
    dtype = str(model.dtype).removeprefix("torch.")
    same = dtype == origin.manifest.language["dtype"]
    manifest = dataclasses.replace(
        origin.manifest,
        kind="lora",
        language=origin.manifest.language | {"dtype": dtype},
        language_fingerprint=origin.manifest.language_fingerprint if same else "",
    )
    by_value = self_contained or origin.holds_language
    scores = _scores(model, trained)
    save_checkpoint(folder, model, None, manifest, trained, self_contained=by_value, scores=scores, tags=tags)


def _origin_of_adapted(model: ToveLlavaForConditionalGeneration) -> Origin:
    fold = "Fold them into it (tove_llava.llava.adapters.fold_adapters(model)) and save the whole model"
    origin = model.origin
    if not isinstance(model.tower, ToveVisionModel):
        raise CheckpointError("a model that is being merged cannot be saved; let the run end, which saves it")
    if origin is None or origin.manifest.kind == "full":
        raise CheckpointError(f"the language model under the adapters is in no source that could be named. {fold}")
    if list(model.peft_config) != ["default"]:
        raise CheckpointError(
            f"one set of adapters can be saved, named 'default', not {list(model.peft_config)}. {fold}"
        )
    language = {id(layer) for layer in adapter_layers(model.model.language_model).values()}
    astray = [name for name, layer in adapter_layers(model).items() if id(layer) not in language]
    if astray:
        raise CheckpointError(f"adapters can be saved on the language model only, not on {astray[0]}. {fold}")
    if not origin.language or language_digest(model) != origin.language:
        raise CheckpointError(
            "the language model under the adapters is not what it was when it was loaded: its weights were changed, "
            f"cast to another dtype, or are offloaded. {fold}, or load it in that dtype (load_model's dtype) first"
        )
    return origin


def _refuse_remains(folder: Path, files: Iterable[Path]) -> None:
    present = [file.name for file in files if file.exists()]
    if present:
        raise CheckpointError(
            f"{folder} holds another kind of checkpoint ({present[0]}), which would be mixed with this; choose another "
            "folder"
        )


def _scores(model: ToveLlavaForConditionalGeneration, weights: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """Return the checkpoint's report if the weights are still the same."""
    origin = model.origin
    report = read_scores(origin.folder)
    if report is None or not weights or not origin.manifest.fingerprint:
        return None
    if origin.manifest.kind == "trained":
        if language_digest(model) != origin.language:
            return None
        weights = {name: weights[name] for name in trained_names(model)}
    return report if exact_fingerprint(weights) == origin.manifest.fingerprint else None


def _on_cpu(parameters: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copy parameters to the CPU; none at all where some are offloaded."""
    if any(p.is_meta for p in parameters.values()):
        return {}
    return {name: p.detach().to("cpu").contiguous() for name, p in parameters.items()}


def _tower_prefix(model: ToveLlavaForConditionalGeneration) -> str:
    return next(name for name, module in model.named_modules() if module is model.tower) + "."


def _save_adapter(
    folder: Path, model: ToveLlavaForConditionalGeneration, tensors: dict[str, torch.Tensor], base: str
) -> None:
    from peft import get_peft_model_state_dict

    config = model.peft_config["default"]
    state = get_peft_model_state_dict(model, state_dict=tensors, adapter_name="default", save_embedding_layers=False)
    save_file({ADAPTER_PREFIX + name: value for name, value in state.items()}, folder / ADAPTER)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    config.inference_mode = False
