"""Build a model and its processor from a preset."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.hub_access import asking
from tove_llava.core.safe_loading import from_pretrained, loading
from tove_llava.core.sources import Source
from tove_llava.data import get_template, load_tokenizer
from tove_llava.experts import complete_specs
from tove_llava.experts.random_weights import random_weights
from tove_llava.llava.configuration import ToveLlavaConfig, forget_gguf
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration
from tove_llava.llava.processing import build_processor
from tove_llava.presets import LanguagePreset, Preset, ProjectorPreset, VisionPreset, load_preset
from tove_llava.tower import ToveVisionConfig, ToveVisionModel

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_TOWER_KEYS = ("clip_layer", "image_size", "fusion", "fusion_options", "projection_dim", "noisy_gating", "top_k",
               "null_slot", "router_aux_loss_coef")  # fmt: skip
EMBEDDING_MULTIPLE = 64  # number of embedding rows, for tensor cores


def build_model(
    preset: str | Preset,
    *,
    overrides: Sequence[str] = (),
    template: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    load_backbones: bool = True,
    seed: int = 42,
) -> tuple[ToveLlavaForConditionalGeneration, LlavaProcessor]:
    """Assemble a preset's language model, tower and projector.

    Args:
        preset: a preset, its name, or the path of a YAML file.
        overrides: ``key.path=value`` strings; see :func:`tove_llava.presets.load_preset`.
        template: conversation template of the processor; the first stage's last one by default.
        dtype: of all parts; the preset's language dtype by default.
        device: where the model is put; the CPU by default.
        load_backbones: False leaves out CLIP and the experts, for a model that is not run.
        seed: of the projector's and the tower's initial values.

    Returns:
        the model, untrained where the preset's parts are, and its processor.

    Raises:
        ConfigError: a wrong preset or key. CheckpointError: a source that is not there or does not fit.

    Example:
        >>> model, processor = tove_llava.build_model("tiny", overrides=["vision.top_k=2"])
        >>> model.tower.config.top_k, processor.conversation_template
        (2, 'v1')
    """
    if isinstance(preset, str):
        preset = load_preset(preset, overrides)
    elif overrides:
        raise ConfigError("overrides apply to a preset's name or path, not to a Preset that is loaded already")
    vision = vision_config(preset.vision)
    processor = prepare_processor(preset, vision, template)
    language = read_language_model(preset.language, dtype)
    model = assemble(language, vision, preset.projector, seed=seed)
    fit_to_processor(model, processor)
    if load_backbones:
        model.tower.load_backbones()
    return model.to(device or "cpu"), processor


def prepare_processor(preset: Preset, vision: ToveVisionConfig, template: str | None = None) -> LlavaProcessor:
    """Build a preset's processor, image token included, without any weights."""
    last = list(preset.stages.values())[-1]
    if template is None:
        template = last.template
    return build_processor(
        prepare_tokenizer(preset.language, template),
        vision,
        image_token=preset.language.image_token,
        template=template,
        image_aspect_ratio=last.image_aspect_ratio,
    )


def vision_config(vision: VisionPreset, *, offline: bool = False) -> ToveVisionConfig:
    """Configure the tower from its preset and its encoders' sources.

    Args:
        offline: take CLIP's architecture from the preset where its source is not a local folder.
    """
    keys = tower_keys(vision)
    source = Source.parse(vision.clip)
    if (offline or source.is_random) and source.path is None and vision.clip_config is not None:
        return ToveVisionConfig(
            clip_config=CLIPVisionConfig(**vision.clip_config),
            clip_source=vision.clip,
            clip_revision=vision.clip_revision,
            experts=complete_specs(vision.experts),
            **keys,
        )
    return ToveVisionConfig.from_sources(
        str(source.absolute()), vision.experts, clip_revision=vision.clip_revision, **keys
    )


def tower_keys(vision: VisionPreset) -> dict[str, Any]:
    """Return a preset's keys of a :class:`ToveVisionConfig`, without CLIP and experts."""
    return {key: getattr(vision, key) for key in _TOWER_KEYS}


def read_language_model(language: LanguagePreset, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model from its source or a whole model."""
    source = Source.parse(language.source)
    wanted = torch_dtype(dtype or language.dtype)
    if source.is_random:
        attention = {"attn_implementation": language.attention} if language.attention else {}
        own = torch_dtype(language.dtype)  # always drawn in this dtype, so that they are the same in each
        with random_weights(source):
            return AutoModelForCausalLM.from_config(
                language_config(language), dtype=own, **attention, trust_remote_code=False
            ).to(wanted)
    if source.path is not None and is_whole_model(source.path):
        return language_model_of(load_whole(source.path, wanted))
    model = from_pretrained(
        AutoModelForCausalLM,
        source,
        "the language model",
        revision=language.revision or "main",
        dtype=wanted,
        **({"attn_implementation": language.attention} if language.attention else {}),
    )
    if source.scheme == "gguf":  # becomes ordinary weights, but stays marked as quantised
        forget_gguf(model.config)
        model.hf_quantizer = None
    return model


def load_whole(folder: Path, dtype: torch.dtype) -> ToveLlavaForConditionalGeneration:
    """Load everything but the frozen backbones."""
    options: dict[str, Any] = {"use_safetensors": True, "load_backbones": False, "output_loading_info": True}
    model, info = from_pretrained(ToveLlavaForConditionalGeneration, folder, "the weights", dtype=dtype, **options)
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise CheckpointError(
            f"{folder}: weights and config.json do not belong together: missing {sorted(info['missing_keys'])[:3]}, "
            f"unexpected {sorted(info['unexpected_keys'])[:3]}, other shapes {sorted(info['mismatched_keys'])[:3]}"
        )
    return model


def is_whole_model(folder: Path) -> bool:
    """Return whether a folder is a saved :class:`ToveLlavaForConditionalGeneration`."""
    try:
        return read_json_object(folder / "config.json").get("model_type") == "tove_llava"
    except CheckpointError:
        return False


def language_model_of(model: ToveLlavaForConditionalGeneration) -> PreTrainedModel:
    """Return a LLaVA's language model as a model that shares the weights."""
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(model.config.text_config, trust_remote_code=False)
    setattr(language, language.base_model_prefix, model.model.language_model)
    language.set_output_embeddings(model.lm_head)
    language.generation_config = model.generation_config
    return language


def read_tokenizer(language: LanguagePreset) -> PreTrainedTokenizerBase:
    """Load the language model's tokenizer, with a padding token."""
    source = Source.parse(language.tokenizer or language.source).architecture
    arguments = source.pretrained()
    name = arguments.pop("pretrained_model_name_or_path")
    if source.path is None and source.scheme == "hf":
        # The folder, so that a SentencePiece model in it is converted exactly.
        wanted = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "config.json"]
        with loading("the tokenizer", source), asking(name):
            name = snapshot_download(name, revision=language.revision, allow_patterns=wanted)
    tokenizer = load_tokenizer(name, **arguments)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token  # LLaVA pads with <unk>
    return tokenizer


def prepare_tokenizer(language: LanguagePreset, template: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer, and make it fit for a conversation template."""
    tokenizer = read_tokenizer(language)
    get_template(template).prepare(tokenizer, language.reasoning, language.date)
    return tokenizer


def assemble(
    language: PreTrainedModel, vision: ToveVisionConfig, projector: ProjectorPreset, *, seed: int = 42
) -> ToveLlavaForConditionalGeneration:
    """Join a language model, uncopied, with a new tower and projector.

    The projector starts from torch's own initialisation, as LLaVA's does. Values depend only on ``seed``.
    """
    config = ToveLlavaConfig(
        vision_config=vision,
        text_config=language.config,
        projector_hidden_act=projector.hidden_act,
        multimodal_projector_bias=projector.bias,
        tie_word_embeddings=bool(language.config.tie_word_embeddings),
    )
    with torch.device("meta"):
        model = ToveLlavaForConditionalGeneration(config)
    parameter = next(language.parameters())
    with torch.random.fork_rng(devices=[]), torch.device("meta" if parameter.is_meta else "cpu"):
        torch.manual_seed(seed)
        model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(parameter.dtype)
        model.model.vision_tower = ToveVisionModel(config.vision_config).to(parameter.dtype)
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    model.generation_config = language.generation_config
    return model


def fit_to_processor(model: ToveLlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Give the model the processor's image and padding tokens, with embeddings.

    New rows of the embeddings and the head are the mean of the old ones: the same on every machine and in every load.
    """
    pad = processor.tokenizer.pad_token_id
    model.config.image_token_index = processor.image_token_id
    model.config.conversation_template = processor.conversation_template
    model.config.pad_token_id = model.config.text_config.pad_token_id = pad
    if model.generation_config is not None:
        model.generation_config.pad_token_id = pad
        if not model.generation_config.do_sample:
            # Vicuna names a temperature without sampling; transformers refuses to save that once it has changed.
            for key in _SAMPLING:
                setattr(model.generation_config, key, None)
    grow_vocabulary(model, len(processor.tokenizer))


def grow_vocabulary(model: ToveLlavaForConditionalGeneration, size: int) -> None:
    """Grow embeddings and head to ``size`` rows, rounded up to a multiple."""
    old = model.get_input_embeddings().weight.shape[0]
    if size <= old:
        return
    rows = math.ceil(size / EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
    model.resize_token_embeddings(rows, mean_resizing=False)
    matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for weight in matrices.values():
            weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return a floating-point dtype by its name."""
    found = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {name!r} is not a floating-point dtype of torch, such as float32 or bfloat16")
    return found


def language_config(language: LanguagePreset) -> Any:
    """Return the language model's architecture from its source or the preset."""
    source = Source.parse(language.source)
    if language.config is not None and source.path is None:
        return AutoConfig.for_model(**language.config)
    revision = language.revision or "main"
    return from_pretrained(AutoConfig, source, "the language model's configuration", revision=revision)


def build_on_meta(
    preset: str | Preset, *, layers: int | None = None, vision: ToveVisionConfig | None = None
) -> ToveLlavaForConditionalGeneration:
    """Build a preset on the meta device, without memory or download.

    Args:
        layers: number of the language model's layers, if fewer are enough.
        vision: the tower's configuration, if it is known already.
    """
    if isinstance(preset, str):
        preset = load_preset(preset)
    config = language_config(preset.language)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(
            config, dtype=torch_dtype(preset.language.dtype), trust_remote_code=False
        )
    vision = vision_config(preset.vision, offline=True) if vision is None else vision
    model = assemble(language, vision, preset.projector)
    grow_vocabulary(model, _planned_tokens(preset.language, config.vocab_size))
    return model


def _planned_tokens(language: LanguagePreset, rows: int) -> int:
    """Count tokens with the image token, of which the embeddings may have rows to spare.

    Without the tokenizer's files every row counts as used, as LLaMA's are.
    """
    source = Source.parse(language.tokenizer or language.source)
    if source.scheme == "hf" and source.path is None:  # the hub is not asked
        return rows + 1
    try:
        tokenizer = read_tokenizer(language)
    except CheckpointError:
        return rows + 1
    return len(tokenizer) + (language.image_token not in tokenizer.get_vocab())


def parameter_names(model: nn.Module, *modules: nn.Module) -> set[str]:
    """List a model's parameters by their modules' names."""
    members = {id(p) for module in modules for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in members}


def parameter_table(model: ToveLlavaForConditionalGeneration) -> list[tuple[str, int]]:
    """List (part, parameters) of the registered parts, without CLIP and experts."""
    parts: list[tuple[str, nn.Module]] = [
        ("language model", nn.ModuleList([model.model.language_model, model.lm_head])),
        ("projector", model.model.multi_modal_projector),
        ("tower (gate and projections)", model.tower.fusion),
    ]
    return [(name, sum(p.numel() for p in part.parameters())) for name, part in parts]
