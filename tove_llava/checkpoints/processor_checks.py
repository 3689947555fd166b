"""Check that a folder's processor and generation settings are its model's."""

from pathlib import Path
from typing import Any

from transformers import LlavaProcessor

from tove_llava.core.errors import CheckpointError
from tove_llava.tower import ToveVisionConfig


def check_processor(folder: Path, model: Any, processor: LlavaProcessor) -> None:
    """Raise CheckpointError for a processor that counts tokens, or names them, in another way than the model."""
    vision = model.config.vision_config
    wanted: dict[str, tuple[int | None, ...]]
    if isinstance(vision, ToveVisionConfig):
        wanted = {"patch_size": (vision.patch_size,)}
        wanted["num_additional_image_tokens"] = (vision.num_image_tokens - vision.num_patches,)
    else:  # folders of before transformers 4.45 leave both to the user
        wanted = {"patch_size": (vision.patch_size, None), "num_additional_image_tokens": (0, 1, None)}
    wanted["image_token_id"] = (model.config.image_token_id,)
    for key, values in wanted.items():
        found = getattr(processor, key, None)
        if found not in values:
            raise CheckpointError(
                f"{folder}: the processor's {key} is {found!r}, but this model's is {values[0]!r}; its files "
                "(processor_config.json, tokenizer.json) are damaged, or another model's"
            )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(processor.tokenizer) > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(processor.tokenizer)} tokens, the model {rows}; its files are another's"
        )
    _check_generation(folder, model.generation_config, rows)


def _check_generation(folder: Path, settings: Any, rows: int) -> None:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(settings, key, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(each, int) and not isinstance(each, bool) and -1 <= each < rows for each in ids):
            raise CheckpointError(
                f"{folder}/generation_config.json: {key} is {value!r}, which is no token of this model"
            )
