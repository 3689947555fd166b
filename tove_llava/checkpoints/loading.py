"""Open model folders: this package's checkpoints, and LLaVA-1.5 of every other format.

A checkpoint folder holds ``config.json``, the processor's files, and ``tove_llava.json`` (the manifest, written last),
whose ``kind`` tells the rest of its content:

``trained``
    ``trained.safetensors``: projector and the tower's own parts. The language model is named by its source.
``lora``
    the same, and peft's ``adapter_config.json`` and ``adapter_model.safetensors`` for the language model.
``full``
    ``model.safetensors`` (or shards): everything but the frozen backbones; ``from_pretrained`` reads it too.

CLIP and the experts are named by their sources in ``config.json``. In a self-contained folder those sources, and the
language model's, point into the folder. Only safetensors are read from it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tove_llava.checkpoints.assemble import assemble_model, load_clip_of, load_language, tower_config
from tove_llava.checkpoints.base import Request, find_format, foreign_format, read_parts
from tove_llava.checkpoints.hub import checkpoint_folder
from tove_llava.checkpoints.manifest import ADAPTER, ADAPTER_CONFIG, ADAPTER_PREFIX, MANIFEST, TRAINED, Manifest
from tove_llava.checkpoints.origin import Origin
from tove_llava.checkpoints.plugin_records import check_plugins
from tove_llava.checkpoints.processor_checks import check_processor
from tove_llava.checkpoints.tensors import file_tensors
from tove_llava.checkpoints.weight_fingerprints import check_stored, sampled_fingerprint
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.finite import check_finite
from tove_llava.core.json_text import plain
from tove_llava.core.safe_loading import from_pretrained
from tove_llava.core.sources import Source
from tove_llava.data import load_tokenizer
from tove_llava.llava.adapter_settings import read_adapter_settings
from tove_llava.llava.adapters import add_adapters
from tove_llava.llava.build import (
    assemble,
    grow_vocabulary,
    load_whole,
    parameter_names,
    read_language_model,
    torch_dtype,
)
from tove_llava.llava.configuration import ToveLlavaConfig
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration
from tove_llava.llava.quantization import quantize, round_weights
from tove_llava.presets import LanguagePreset, ProjectorPreset, QuantizationPreset
from tove_llava.tower import ToveVisionModel

STOCK = "llava-hf"  # the format of transformers' own LLaVA


def load_model(
    folder: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    merge_lora: bool = False,
    load_backbones: bool = True,
    quantization: QuantizationPreset | None = None,
    base: str | None = None,
    clip: str | None = None,
    template: str | None = None,
    keep_stock: bool = False,
) -> tuple[Any, LlavaProcessor]:
    """Load a model folder of any format, in eval mode, without writing.

    A model that was trained over a quantised language model keeps the weights that quantisation left, in whatever form
    they are held. A LLaVA-1.5 of another format becomes a model whose tower is only CLIP.

    Args:
        folder: a finished run's output folder; ``hf:owner/name``, a repository of the hub that holds one; or a
            LLaVA-1.5 of haotian-liu/LLaVA or transformers.
        dtype: of the whole model; that of the language model in training by default.
        device: the CPU by default.
        merge_lora: fold adapters into the language model's weights.
        load_backbones: False leaves out CLIP and the experts.
        quantization: hold the language model's linear layers in 4 or 8 bits, next to the adapters. The same number of
            bits as in training gives the weights of training.
        base, clip, template: for other formats; see :func:`tove_llava.convert_checkpoint`.
        keep_stock: leave transformers' own LLaVA as it is, a ``LlavaForConditionalGeneration``; also open an export
            with experts. Its code is not run.

    Returns:
        the model, and its processor, whose ``conversation_template`` is the registered name of the template.

    Raises:
        CheckpointError: the folder is incomplete, damaged, of another tower, or names a source that is not there.
        ConfigError: adapters are to be folded into quantised weights, or bitsandbytes is not installed.

    Example:
        >>> model, processor = tove_llava.load_model(run)  # the output folder of a training run
        >>> model.get_routing(image).shape, processor.conversation_template  # [images, tokens, experts]
        (torch.Size([1, 16, 2]), 'v1')
    """
    folder = checkpoint_folder(folder)
    if keep_stock and (is_stock_llava(folder) or _is_export(folder)):
        return _load_stock(folder, dtype, device, quantization)
    if not (folder / MANIFEST).is_file() and foreign_format(folder) is not None:
        parts = read_parts(folder, Request(base=base, clip=clip, template=template))
        language = load_language(parts.language, dtype or parts.language.dtype)
        model, processor = assemble_model(parts, tower_config(parts.clip, folder), language, merge_lora=merge_lora)
        model.config.conversation_template = parts.template
        if load_backbones:
            load_clip_of(parts.clip, model.tower)
            model.tower.load_backbones()
        model = model.to(device or "cpu").eval()
        _quantize(model, None, quantization, model.dtype, device)
        return model, processor
    if base is not None or clip is not None or template is not None:
        raise ConfigError(
            f"{folder} names its own language model, CLIP and template; leave base, clip and template out"
        )
    model = read_model(folder, dtype, device, merge_lora, load_backbones, quantization)
    processor = load_processor(folder)
    check_processor(folder, model, processor)
    return model, processor


def open_llava(
    folder: str | os.PathLike[str], **options: Any
) -> tuple[ToveLlavaForConditionalGeneration, LlavaProcessor]:
    """Open a LLaVA-1.5 with :func:`load_model`; errors speak of formats.

    Args:
        folder: of any format.
        options: those of :func:`load_model`.

    Returns:
        model and processor.

    Raises:
        CheckpointError: the folder has no known format, or is damaged.

    Example:
        >>> model, processor = tove_llava.open_llava(llava)
        >>> model.tower.active_experts  # its tower is only CLIP
        []
    """
    find_format(Path(folder))
    return load_model(folder, **options)


def is_stock_llava(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds a foreign ``LlavaForConditionalGeneration``."""
    return not (Path(folder) / MANIFEST).exists() and foreign_format(Path(folder)) == STOCK


def _is_export(folder: Path) -> bool:
    """Return whether a folder is an export of the format remote-code."""
    file = folder / "config.json"
    if (folder / MANIFEST).exists() or not file.is_file():
        return False
    return read_json_object(file).get("model_type") == ToveLlavaConfig.model_type


def _load_stock(
    folder: Path,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    quantization: QuantizationPreset | None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    wanted = "auto" if dtype is None else torch_dtype(dtype)
    kind = ToveLlavaForConditionalGeneration if _is_export(folder) else LlavaForConditionalGeneration
    model = from_pretrained(kind, folder, "the model", dtype=wanted, use_safetensors=True)
    processor = from_pretrained(LlavaProcessor, folder, "the processor")
    processor.tokenizer = load_tokenizer(folder)  # with SentencePiece's ids, as in training
    check_processor(folder, model, processor)
    processor.conversation_template = getattr(model.config, "conversation_template", None)
    tower = model.model.vision_tower
    if isinstance(tower, ToveVisionModel):
        tower.load_backbones(base_dir=folder)
    _quantize(model, None, quantization, model.dtype, device)
    return model.to(device or "cpu").eval(), processor


def read_model(
    folder: Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    merge_lora: bool = False,
    load_backbones: bool = True,
    quantization: QuantizationPreset | None = None,
) -> ToveLlavaForConditionalGeneration:
    """Load this package's own checkpoint without its processor; see :func:`load_model`."""
    if quantization is not None and merge_lora:
        raise ConfigError("adapters cannot be folded into weights of 4 or 8 bits; ask for one of the two")
    manifest = Manifest.read(folder)
    check_plugins(folder, manifest)
    wanted = torch_dtype(dtype or manifest.language["dtype"])
    model = load_whole(folder, wanted) if manifest.kind == "full" else _load_on_language_model(folder, manifest, wanted)
    _quantize(model, manifest.trained_quantization, quantization, wanted, device)
    _cast(model, wanted)  # before anything is filled in or folded: the sums are computed in this dtype
    if manifest.kind != "full":
        _fill(model, file_tensors(folder / TRAINED), trained_names(model), folder)
    if manifest.kind == "lora":
        _load_adapter(folder, model, merge=merge_lora)
    if manifest.kind != "full":
        check_stored(folder, manifest)
    _cast(model, wanted)
    if load_backbones:
        model.tower.load_backbones(base_dir=folder)
    model.origin = Origin.of(model, folder, manifest)
    return model.to(device or "cpu").eval()


def load_processor(folder: str | os.PathLike[str]) -> LlavaProcessor:
    """Load a checkpoint's processor; ``processor.conversation_template`` is the template's registered name."""
    manifest = Manifest.read(folder)
    advice = "Save it next to the model (processor.save_pretrained)"
    # Pillow resizes, as in training.
    processor = from_pretrained(LlavaProcessor, folder, "the processor", advice, backend="pil")
    processor.conversation_template = manifest.template
    return processor


def load_trained(model: ToveLlavaForConditionalGeneration, folder: str | os.PathLike[str]) -> Manifest:
    """Put an earlier stage's projector and tower into a new model."""
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
    _fill(model, file_tensors(folder / TRAINED), trained_names(model), folder)
    check_stored(folder, manifest)
    return manifest


def tower_differences(saved: ToveLlavaConfig, present: ToveLlavaConfig) -> list[str]:
    """List how a saved tower and projector differ from a model's."""
    # Compared as JSON, where lists and tuples are equal.
    old, new = (plain(c.vision_config.to_dict()) for c in (saved, present))
    phrases = []
    if saved.vision_config.expert_names != present.vision_config.expert_names:
        names = [", ".join(c.vision_config.expert_names) or "none" for c in (saved, present)]
        phrases.append(f"its experts are {names[0]}, this model's {names[1]}")
    else:
        for a, b in zip(old["experts"], new["experts"], strict=True):
            odd = [key for key in a if a[key] != b.get(key)]
            phrases += [f"expert {a['name']}: {key} {a[key]!r} against {b.get(key)!r}" for key in odd]
    keys = ["clip_source", "clip_revision", "clip_layer", "image_size", "fusion", "fusion_options", "projection_dim"]
    keys += ("noisy_gating", "top_k", "null_slot", "image_mean", "image_std")
    phrases += [f"{k} {old[k]!r} against {new[k]!r}" for k in keys if old[k] != new[k]]
    widths = [(c.vision_config.hidden_size, c.text_config.hidden_size) for c in (saved, present)]
    if widths[0] != widths[1]:
        phrases.append(f"projector of widths {widths[0]} (vision, language) against {widths[1]}")
    return phrases


def trained_names(model: ToveLlavaForConditionalGeneration) -> set[str]:
    """List the names of the projector's and the tower's own parameters."""
    return parameter_names(model, model.model.multi_modal_projector, model.tower.fusion)


def read_config(folder: Path) -> ToveLlavaConfig:
    """Read a checkpoint's configuration; CheckpointError also for a missing plugin."""
    check_plugins(folder, Manifest.read(folder))
    if not (folder / "config.json").is_file():  # transformers would go on with its defaults
        raise CheckpointError(f"{folder} lacks config.json; the checkpoint is incomplete, copy it again")
    return from_pretrained(ToveLlavaConfig, folder, "config.json")


def _quantize(
    model: LlavaForConditionalGeneration,
    trained: QuantizationPreset | None,
    wanted: QuantizationPreset | None,
    dtype: torch.dtype,
    device: str | torch.device | None,
) -> None:
    """Give the language model its weights of training in the wanted form."""
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
        dtype = torch_dtype(manifest.language["dtype"])  # quantisation starts from the dtype of training
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
    """Cast weights; buffers, such as rotary frequencies, keep their precision."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.tower.to(dtype)  # casts the backbones too


def _fill(
    model: ToveLlavaForConditionalGeneration, tensors: Mapping[str, torch.Tensor], names: set[str], where: Path
) -> None:
    """Copy tensors into parameters, every one of ``names`` exactly once."""
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    missing, unexpected = parameters.keys() - tensors.keys(), tensors.keys() - parameters.keys()
    shapes = [n for n in parameters.keys() & tensors.keys() if parameters[n].shape != tensors[n].shape]
    if missing or unexpected or shapes:
        example = [f"{n}: {tuple(tensors[n].shape)} against {tuple(parameters[n].shape)}" for n in sorted(shapes)[:2]]
        raise CheckpointError(
            f"{where} is a checkpoint of another tower: missing {sorted(missing)[:2]}, "
            f"unexpected {sorted(unexpected)[:2]}, other shapes {example}"
        )
    check_finite(tensors.items(), where)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _load_adapter(folder: Path, model: ToveLlavaForConditionalGeneration, *, merge: bool) -> None:
    settings = read_adapter_settings(folder / ADAPTER_CONFIG, "merge the adapters with peft, and train from that")
    tensors = {name.removeprefix(ADAPTER_PREFIX): value for name, value in file_tensors(folder / ADAPTER).items()}
    add_adapters(model, settings | {"inference_mode": True}, tensors, folder / ADAPTER, merge=merge)
