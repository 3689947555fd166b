"""Load whole models, and take the language model out of one."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from tove_llava.core.errors import CheckpointError
from tove_llava.core.files import read_json_object
from tove_llava.llava.modeling import ToveLlavaForConditionalGeneration


def load_whole(folder: Path, dtype: torch.dtype) -> ToveLlavaForConditionalGeneration:
    """Load everything but the frozen backbones."""
    try:
        model, info = ToveLlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, load_backbones=False, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be loaded: {error}") from error
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
        language = AutoModelForCausalLM.from_config(model.config.text_config)
    setattr(language, language.base_model_prefix, model.model.language_model)
    language.set_output_embeddings(model.lm_head)
    language.generation_config = model.generation_config
    return language
