"""Checkpoints of a ToVE-LLaVA: what a stage trained, by value; what it left as it was, by reference.

A folder holds ``config.json``, the processor's files, and, written last, ``tove_llava.json`` (the manifest), whose
``kind`` says what else there is:

``trained``
    ``trained.safetensors``: projector and the tower's own parts. The language model is named by its source.
``lora``
    the same, and peft's ``adapter_config.json`` and ``adapter_model.safetensors`` for the language model.
``full``
    ``model.safetensors`` (or shards): everything but the frozen backbones; ``from_pretrained`` reads it too.

CLIP and the experts are named by their sources in ``config.json``. In a self-contained folder those sources, and the
language model's, point into the folder. Only safetensors are ever read.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlavaProcessor

from tove_llava.checkpoints.card import write_card
from tove_llava.checkpoints.hub import checkpoint_folder
from tove_llava.checkpoints.manifest import ADAPTER, ADAPTER_PREFIX, MANIFEST, TRAINED, Manifest, write_manifest
from tove_llava.checkpoints.origin import Origin
from tove_llava.checkpoints.weight_fingerprints import exact_fingerprint, sampled_fingerprint
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.licences import known, licence_of
from tove_llava.core.sources import Source, write_origin
from tove_llava.llava.adapters import add_adapters
from tove_llava.llava.build import assemble, grow_vocabulary, read_language_model, torch_dtype
from tove_llava.llava.configuration import ToveLlavaConfig
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration
from tove_llava.llava.quantization import quantize, round_weights
from tove_llava.llava.whole_model import load_whole
from tove_llava.presets import LanguagePreset, ProjectorPreset, QuantizationPreset


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
    """Writes a checkpoint folder; the manifest last, so that an interrupted save is seen as incomplete.

    Args:
        folder: may hold other files, which are left alone.
        processor: None leaves it to the caller to save one.
        manifest: its fingerprint is filled in.
        trained: the stage's trained parameters by their name in ``model``, gathered on the CPU.
        self_contained: also write CLIP, the experts and the language model.
        in_place: what the configuration names by paths inside a checkpoint lies in ``folder`` already.
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
    fingerprint = exact_fingerprint(trained)
    prefix = next(name for name, module in model.named_modules() if module is model.tower) + "."
    if in_place:
        config.vision_config = model.tower.config
    else:
        config.vision_config, trained = model.tower.save_parts(folder, trained, prefix, self_contained)
    if self_contained and manifest.kind != "full":
        read_language_model(LanguagePreset(**language)).save_pretrained(folder / "language")
        write_origin(folder / "language", language["source"], known(licence_of(language["source"])))
        language |= {"source": "hf:./language", "revision": None}

    adapters = _adapter_names(model) & trained.keys()
    if manifest.kind == "full":
        # Under the model's own names; save_pretrained would write those of an older layout.
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
    write_card(
        folder, model.config.vision_config, manifest, scores=scores, tags=tags
    )  # of the sources, wherever copies lie
    write_manifest(folder, dataclasses.replace(manifest, language=language, fingerprint=fingerprint))


def load_model(
    folder: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    merge_lora: bool = False,
    load_backbones: bool = True,
    quantization: QuantizationPreset | None = None,
) -> tuple[ToveLlavaForConditionalGeneration, LlavaProcessor]:
    """Loads any folder that training writes, in eval mode.

    A model that was trained over a quantised language model has the weights that quantisation left of it, in whatever
    form they are held.

    Args:
        folder: a finished run's output folder; or ``hf:owner/name``, a repository of the hub that holds one; or a
            LLaVA-1.5 of another format, as ``tove_llava.open_llava`` opens it.
        dtype: of the whole model; that of the language model in training by default.
        device: the CPU by default.
        merge_lora: fold adapters into the language model's weights.
        load_backbones: False leaves out CLIP and the experts.
        quantization: hold the language model's linear layers in so many bits, adapters beside them. If it was trained
            in as many, then as in training.

    Raises:
        CheckpointError: the folder is incomplete, damaged, of another tower, or names a source that is not there.
        ConfigError: adapters are to be folded into quantised weights, or bitsandbytes is not installed.
    """
    folder = checkpoint_folder(folder)
    if not (folder / MANIFEST).is_file():
        from tove_llava.checkpoints.base import foreign_format
        from tove_llava.checkpoints.conversion import open_llava

        if foreign_format(folder) is not None:
            model, processor = open_llava(
                folder, dtype=dtype, device=device, merge_lora=merge_lora, load_backbones=load_backbones
            )
            _quantize(model, None, quantization, model.dtype, device)
            return model, processor
    model = read_model(
        folder,
        dtype=dtype,
        device=device,
        merge_lora=merge_lora,
        load_backbones=load_backbones,
        quantization=quantization,
    )
    return model, load_processor(folder)


def read_model(
    folder: Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    merge_lora: bool = False,
    load_backbones: bool = True,
    quantization: QuantizationPreset | None = None,
) -> ToveLlavaForConditionalGeneration:
    """:func:`load_model` without the processor, which a folder need not have."""
    if quantization is not None and merge_lora:
        raise ConfigError("adapters cannot be folded into weights of 4 or 8 bits; ask for one of the two")
    manifest = Manifest.read(folder)
    wanted = torch_dtype(dtype or manifest.language["dtype"])
    model = load_whole(folder, wanted) if manifest.kind == "full" else _load_on_language_model(folder, manifest, wanted)
    _quantize(model, manifest.trained_quantization, quantization, wanted, device)
    _cast(model, wanted)  # before anything is filled in or folded: sums are made in the dtype that is asked for
    if manifest.kind != "full":
        _fill(model, read_tensors(folder / TRAINED), trained_names(model), folder)
    if manifest.kind == "lora":
        _load_adapter(folder, model, merge=merge_lora)
    _cast(model, wanted)
    if load_backbones:
        model.tower.load_backbones(base_dir=folder)
    model.origin = Origin.of(model, folder, manifest)
    return model.to(device or "cpu").eval()


def load_processor(folder: str | os.PathLike[str]) -> LlavaProcessor:
    """The processor of a checkpoint folder; ``processor.conversation_template`` is the template's registered name.

    Raises:
        CheckpointError: the folder is incomplete.
    """
    manifest = Manifest.read(folder)
    try:
        processor = LlavaProcessor.from_pretrained(folder, backend="pil")  # Pillow resizes, as in training
    except OSError as error:
        raise CheckpointError(
            f"{folder} has no processor beside the model; save it there (processor.save_pretrained): {error}"
        ) from error
    processor.conversation_template = manifest.template
    return processor


def load_trained(model: ToveLlavaForConditionalGeneration, folder: str | os.PathLike[str]) -> Manifest:
    """Puts an earlier stage's projector and tower into a model that was built from a preset.

    Raises:
        CheckpointError: the folder is not one of stage 1, or its tower or language model is another one.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if manifest.kind != "trained":
        raise CheckpointError(
            f"{folder} is a {manifest.kind!r} checkpoint; a stage starts from stage 1's folder, or from a model whose "
            "adapters are merged (tove-llava merge-lora)"
        )
    differences = tower_differences(read_config(folder), model.config)
    if differences:
        raise CheckpointError(
            f"{folder} is a checkpoint of another tower: {'; '.join(differences)}. Start from the preset and the --set "
            "overrides that it was trained with, or train stage 1 again"
        )
    _fill(model, read_tensors(folder / TRAINED), trained_names(model), folder)
    return manifest


def tower_differences(saved: ToveLlavaConfig, present: ToveLlavaConfig) -> list[str]:
    """What makes a saved tower and projector unfit for another model, one phrase each; empty when they fit."""
    old, new = saved.vision_config.to_dict(), present.vision_config.to_dict()
    phrases = []
    if saved.vision_config.expert_names != present.vision_config.expert_names:
        names = [", ".join(c.vision_config.expert_names) or "none" for c in (saved, present)]
        phrases.append(f"its experts are {names[0]}, this model's {names[1]}")
    else:
        for a, b in zip(old["experts"], new["experts"], strict=True):
            odd = [key for key in a if _plain(a[key]) != _plain(b.get(key))]
            phrases += [f"expert {a['name']}: {key} {a[key]!r} against {b.get(key)!r}" for key in odd]
    keys = ["clip_source", "clip_revision", "clip_layer", "image_size", "fusion", "fusion_options", "projection_dim"]
    keys += ("noisy_gating", "top_k", "null_slot", "image_mean", "image_std")
    phrases += [f"{k} {old[k]!r} against {new[k]!r}" for k in keys if _plain(old[k]) != _plain(new[k])]
    widths = [(c.vision_config.hidden_size, c.text_config.hidden_size) for c in (saved, present)]
    if widths[0] != widths[1]:
        phrases.append(f"projector of widths {widths[0]} (vision, language) against {widths[1]}")
    return phrases


def trained_names(model: ToveLlavaForConditionalGeneration) -> set[str]:
    """Names of the projector's and the tower's own parameters."""
    members = {id(p) for m in (model.model.multi_modal_projector, model.tower.fusion) for p in m.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in members}


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist; the checkpoint is incomplete") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def read_config(folder: Path) -> ToveLlavaConfig:
    """A checkpoint's configuration.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return ToveLlavaConfig.from_pretrained(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}/config.json cannot be read: {error}") from error


def _quantize(
    model: ToveLlavaForConditionalGeneration,
    trained: QuantizationPreset | None,
    wanted: QuantizationPreset | None,
    dtype: torch.dtype,
    device: str | torch.device | None,
) -> None:
    """Brings the language model's weights into the state that they were trained in, and then into the wanted form."""
    if trained is not None and wanted is not None and trained.bits == wanted.bits:
        quantize(model, trained, compute_dtype=dtype, device=device)
        return
    if trained is not None:
        round_weights(model, trained, device=device)
    if wanted is not None:
        quantize(model, wanted, compute_dtype=dtype, device=device)


def _load_on_language_model(folder: Path, manifest: Manifest, dtype: torch.dtype) -> ToveLlavaForConditionalGeneration:
    config = read_config(folder)
    if manifest.quantization is not None:
        dtype = torch_dtype(manifest.language["dtype"])  # quantisation starts from the values that it had in training
    source = Source.parse(manifest.language["source"]).resolve(folder)
    language = read_language_model(LanguagePreset(**{**manifest.language, "source": str(source)}), dtype)
    comparable = manifest.language_fingerprint and dtype == torch_dtype(manifest.language["dtype"])
    if comparable and sampled_fingerprint(language) != manifest.language_fingerprint:
        raise CheckpointError(
            f"{folder}: the language model {source} is not the one that this checkpoint was trained on: "
            "its weights have changed since. Bring back that version, name its revision, or train again"
        )
    projector = ProjectorPreset(hidden_act=config.projector_hidden_act, bias=config.multimodal_projector_bias)
    model = assemble(language, config.vision_config, projector)
    grow_vocabulary(model, config.text_config.vocab_size)
    if model.config.text_config.vocab_size != config.text_config.vocab_size:
        raise CheckpointError(
            f"{folder}: the language model {source} has {model.config.text_config.vocab_size} tokens, the checkpoint "
            f"was trained with {config.text_config.vocab_size}; the source has changed"
        )
    for key in ("image_token_index", "pad_token_id", "conversation_template", "image_aspect_ratio"):
        setattr(model.config, key, getattr(config, key, None))
    model.config.text_config.pad_token_id = config.text_config.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model


def _cast(model: ToveLlavaForConditionalGeneration, dtype: torch.dtype) -> None:
    """Weights alone: buffers, such as the frequencies of rotary positions, keep the precision that they are made in."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.tower.to(dtype)  # and with it the backbones


def _fill(
    model: ToveLlavaForConditionalGeneration, tensors: Mapping[str, torch.Tensor], names: set[str], where: Path
) -> None:
    """Copies tensors into parameters; every one of ``names`` exactly once."""
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    missing, unexpected = parameters.keys() - tensors.keys(), tensors.keys() - parameters.keys()
    shapes = [n for n in parameters.keys() & tensors.keys() if parameters[n].shape != tensors[n].shape]
    if missing or unexpected or shapes:
        example = [f"{n}: {tuple(tensors[n].shape)} against {tuple(parameters[n].shape)}" for n in sorted(shapes)[:2]]
        raise CheckpointError(
            f"{where} is a checkpoint of another tower: missing {sorted(missing)[:2]}, "
            f"unexpected {sorted(unexpected)[:2]}, other shapes {example}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _adapter_names(model: ToveLlavaForConditionalGeneration) -> set[str]:
    """Everything trained inside the language model of a LoRA stage."""
    members = {id(p) for m in (model.model.language_model, model.lm_head) for p in m.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in members}


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


def _load_adapter(folder: Path, model: ToveLlavaForConditionalGeneration, *, merge: bool) -> None:
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(folder))
    tensors = {name.removeprefix(ADAPTER_PREFIX): value for name, value in read_tensors(folder / ADAPTER).items()}
    add_adapters(model, config, tensors, folder / ADAPTER, merge=merge)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
