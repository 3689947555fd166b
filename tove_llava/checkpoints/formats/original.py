"""``original``: the folders of haotian-liu/LLaVA 1.5.

Three layouts: a whole model; stage 1's ``mm_projector.bin``; adapters (``adapter_model.*``) with
``non_lora_trainables.bin``. The last two need the language model that they were trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from tove_llava.checkpoints import original_layout as layout
from tove_llava.checkpoints.base import LlavaFormat, Request, register_format
from tove_llava.checkpoints.clip import (
    clip_config,
    fetch_clip,
    has_published_names,
    is_hub_name,
    read_clip,
    read_normalisation,
    save_clip,
)
from tove_llava.checkpoints.manifest import ADAPTER, ADAPTER_CONFIG
from tove_llava.checkpoints.parts import (
    EMBEDDINGS,
    HEAD,
    AdapterPart,
    ClipPart,
    LanguagePart,
    LlavaParts,
    TowerPart,
    parse_source,
)
from tove_llava.checkpoints.tensors import Tensors, file_tensors, folder_tensors, has_weights, write_json
from tove_llava.checkpoints.tokenizer_files import foreign_tokens, legacy_remarks, read_tokenizer, write_tokenizer
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.sources import Source

PROJECTOR, NON_LORA = "mm_projector.bin", "non_lora_trainables.bin"
CLIP_FOLDER = "vision_tower"  # folder of a CLIP that has no public name

_MERGE_FIRST = "merge the adapters with the original's scripts/merge_lora_weights.py and convert the result"


@register_format("original")
class Original(LlavaFormat):
    """A folder that haotian-liu/LLaVA trains and reads."""

    summary = "haotian-liu/LLaVA: a whole model, stage 1's projector, or LoRA adapters"

    def detect(self, folder: Path, config: dict[str, Any]) -> bool:
        return "mm_vision_tower" in config or any((folder / name).is_file() for name in (PROJECTOR, NON_LORA))

    def read(self, folder: Path, request: Request) -> LlavaParts:
        config = read_json_object(folder / "config.json")
        layout.check_supported(config, folder)
        if (folder / ADAPTER_CONFIG).is_file() or (folder / NON_LORA).is_file():
            return _read_adapters(folder, config, request)
        if has_weights(folder) or not (folder / PROJECTOR).is_file():
            return _read_whole(folder, config, request)
        return _read_projector(folder, config, request)

    def read_tower(self, folder: Path, request: Request) -> TowerPart:
        config = read_json_object(folder / "config.json")
        layout.check_supported(config, folder)
        stored: Tensors = {}
        if (folder / NON_LORA).is_file():
            stored = _non_lora(folder)["clip"]
        elif has_weights(folder):
            stored = layout.sort_tensors(folder_tensors(folder), folder)["clip"]
        return TowerPart(_clip(folder, config, stored, request), _aspect_ratio(config))

    def write(self, parts: LlavaParts, folder: Path, request: Request) -> None:
        layout.check_writable(parts)
        if parts.language.tensors is not None and parts.adapter is not None:
            raise ConfigError(
                f"{parts.folder} holds adapters and their language model in one folder, for which the original has no "
                "layout; merge them first (tove-llava merge-lora)"
            )
        if parts.language.tensors is None:
            vocab_size = parts.language.config.vocab_size
            clip_name = _write_clip(parts, folder, request, named=False)
            _write_trained(parts, folder)
        else:
            clip_name = _write_clip(parts, folder, request, named=True)
            vocab_size = _write_whole(parts, folder)
        config = layout.original_config(parts, vocab_size, clip_name)
        if parts.language.tensors is None:
            config["_name_or_path"] = Source.parse(parts.language.source).target
        write_json(folder / "config.json", config)
        _remark_on_name(parts, request)


def _read_whole(folder: Path, config: dict[str, Any], request: Request) -> LlavaParts:
    if request.base is not None:
        raise ConfigError(f"{folder} holds a whole model; --base is for folders without a language model")
    found = layout.sort_tensors(folder_tensors(folder), folder)
    language = LanguagePart.by_value(folder, found["language"], layout.language_config(config, folder))
    return _parts(folder, config, request, language, found, "v1")


def _read_projector(folder: Path, config: dict[str, Any], request: Request) -> LlavaParts:
    found = layout.sort_tensors(file_tensors(folder / PROJECTOR), folder)
    if found["language"]:
        raise ConfigError(
            f"{folder / PROJECTOR} also holds {sorted(found['language'])[0]!r}; LLaVA-1.5's stage 1 trains only "
            "the projector"
        )
    return _parts(folder, config, request, _base(folder, config, request), found, "plain")


def _read_adapters(folder: Path, config: dict[str, Any], request: Request) -> LlavaParts:
    language = _base(folder, config, request)
    files = [folder / name for name in (ADAPTER, "adapter_model.bin")]
    file = next((file for file in files if file.is_file()), files[0])
    tensors = {name.removeprefix(layout.PEFT_PREFIX): value for name, value in file_tensors(file).items()}
    adapter = AdapterPart.read(folder / ADAPTER_CONFIG, tensors, _MERGE_FIRST)
    found = _non_lora(folder)
    if found["language"]:
        raise ConfigError(
            f"{folder / NON_LORA} holds trained weights of the language model besides the adapters, such as "
            f"{sorted(found['language'])[0]!r}; merge with the original's scripts/merge_lora_weights.py first"
        )
    parts = _parts(folder, config, request, language, found, "v1")
    parts.adapter = adapter
    return parts


def _non_lora(folder: Path) -> dict[str, Tensors]:
    """Read what was trained besides the adapters, by part."""
    stored = file_tensors(folder / NON_LORA).items()
    return layout.sort_tensors({name.removeprefix(layout.PEFT_PREFIX): value for name, value in stored}, folder)


def _aspect_ratio(config: dict[str, Any]) -> str:
    return config.get("image_aspect_ratio") or "square"


def _parts(
    folder: Path,
    config: dict[str, Any],
    request: Request,
    language: LanguagePart,
    found: dict[str, Tensors],
    template: str,
) -> LlavaParts:
    clip = _clip(folder, config, found["clip"], request)
    if clip.config.hidden_size != config.get("mm_hidden_size", clip.config.hidden_size):
        raise CheckpointError(
            f"{folder}: the projector reads tokens of width {config['mm_hidden_size']}, but CLIP's are "
            f"{clip.config.hidden_size} wide; give the right one with --clip"
        )
    return LlavaParts(
        folder=folder,
        language=language,
        remarks=legacy_remarks(language),
        projector=found["projector"],
        clip=clip,
        tokenizer=read_tokenizer(language, folder),
        template=request.template or template,
        image_aspect_ratio=_aspect_ratio(config),
        model_max_length=config.get("tokenizer_model_max_length") or 2048,
    )


def _base(folder: Path, config: dict[str, Any], request: Request) -> LanguagePart:
    """Return the language model that a folder without one was trained on."""
    if request.base is None:
        name = config.get("_name_or_path")
        raise ConfigError(
            f"{folder} holds no language model: give the one that it was trained on with --base"
            + (f" (its config.json says {name!r})" if isinstance(name, str) and name else "")
            + f": tove-llava convert --model {folder} --base SOURCE --out NEW_FOLDER"
        )
    language = LanguagePart.by_reference(parse_source(request.base))
    own = layout.language_config(config, folder)
    for key in ("model_type", "hidden_size"):
        if getattr(language.config, key, None) != getattr(own, key):
            raise CheckpointError(
                f"{folder} was trained on a language model with {key} {getattr(own, key)!r}, but that of "
                f"{language.source} is {getattr(language.config, key, None)!r}; give the right one with --base"
            )
    return language


def _clip(folder: Path, config: dict[str, Any], stored: Tensors, request: Request) -> ClipPart:
    """Return CLIP by value if the folder holds it, else by name."""
    name, layer = config["mm_vision_tower"], config["mm_vision_select_layer"]
    inside = folder / CLIP_FOLDER
    advice = f"{folder}: give CLIP's folder or its name on the hub with --clip"
    if request.clip is not None:
        source = parse_source(request.clip)
    elif inside.is_dir():
        source = f"hf:{inside.absolute()}"
    elif is_hub_name(name) or Path(name).is_dir():
        source = str(Source.parse(f"hf:{name}").absolute())
    else:
        raise CheckpointError(f"mm_vision_tower {name!r} is no folder here and no name on the hub. {advice}")
    architecture = clip_config(source, advice)
    path = Source.parse(source).path
    part = ClipPart(architecture, layer, source=source, normalisation=read_normalisation(path))
    if stored:
        public = path is None and (request.clip is not None or not config.get("unfreeze_mm_vision_tower"))
        part.tensors, part.source = stored, source if public else ""
    elif request.clip is None and inside.is_dir():
        part = read_clip(inside, part.depth)
    return part


def _write_whole(parts: LlavaParts, folder: Path) -> int:
    """Write weights and tokenizer, and return the number of tokens."""
    language, rows = parts.language, parts.language.config.vocab_size
    assert language.tensors is not None
    gone = foreign_tokens(parts)
    tensors = dict(language.tensors)
    if gone:
        rows = 1 + max(index for token, index in parts.tokenizer.get_vocab().items() if token not in gone)
        tensors |= {name: tensors[name][:rows].clone() for name in (EMBEDDINGS, HEAD) if name in tensors}
        parts.remarks.append(f"Tokens that the original does not have were left out: {', '.join(gone)}.")
    tensors |= layout.projector_names(parts.projector)
    if parts.clip.tensors is not None:
        tensors |= layout.clip_names(parts.clip.tensors)
    save_torch_state_dict(tensors, folder)
    write_tokenizer(parts, folder, gone, portable=True)
    if not (folder / "tokenizer.model").is_file():
        parts.remarks.append(
            "The tokenizer has no SentencePiece file: the original opens it, but its training code asks for one."
        )
    generation = language.generation or {}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    named = {key: generation.get(key, getattr(language.config, key, None)) for key in keys}
    write_json(folder / "generation_config.json", {key: value for key, value in named.items() if value is not None})
    return rows


def _write_trained(parts: LlavaParts, folder: Path) -> None:
    """Write projector and adapters; the language model is named, not written."""
    prefix = "" if parts.adapter is None else layout.PEFT_PREFIX
    # Copies, because torch.save would write the whole mapped file.
    projector = {prefix + name: value.clone() for name, value in layout.projector_names(parts.projector).items()}
    torch.save(projector, folder / (PROJECTOR if parts.adapter is None else NON_LORA))
    if parts.adapter is not None:
        adapter = {layout.PEFT_PREFIX + name: value.contiguous() for name, value in parts.adapter.tensors.items()}
        save_file(adapter, folder / ADAPTER, metadata={"format": "pt"})
        own = parts.adapter.settings
        settings = {
            **{key: value for key, value in own.items() if value is not False},  # old versions of peft know fewer keys
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": Source.parse(parts.language.source).target,
            "target_modules": parts.adapter.layers,
            "inference_mode": True,
        }
        write_json(folder / ADAPTER_CONFIG, settings)
    parts.remarks.append(f"Its language model is {parts.language.source}: give it to the original as --model-base.")


def _write_clip(parts: LlavaParts, folder: Path, request: Request, *, named: bool) -> str:
    """Return the value of ``mm_vision_tower``; write a CLIP without public name.

    Args:
        named: CLIP by value may be left to its public name, because its tensors go into the weights too.
    """
    clip = parts.clip
    if clip.tensors is None and not has_published_names(clip):
        clip = fetch_clip(clip)
    elif clip.source and (clip.tensors is None or named):
        return Source.parse(clip.source).target
    save_clip(clip, folder / CLIP_FOLDER)
    assert request.out is not None
    path = request.out.absolute() / CLIP_FOLDER
    parts.remarks.append(f"The original reads CLIP from {path}: correct mm_vision_tower in config.json after a move.")
    return str(path)


def _remark_on_name(parts: LlavaParts, request: Request) -> None:
    """Remark on the folder's name; the original chooses classes by its words."""
    assert request.out is not None
    wanted = ["llava"] + (["lora"] if parts.adapter is not None else [])
    lacking = [word for word in wanted if word not in request.out.name.lower()]
    if lacking:
        parts.remarks.append(f"The original wants {' and '.join(lacking)} in the folder's name; rename it.")
