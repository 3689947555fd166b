"""From a checkpoint to an exported folder, all of it or nothing."""

import os
from pathlib import Path

from tove_llava.checkpoints.export_format import FORMATS, ExportSource
from tove_llava.checkpoints.loading import load_model
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.core.errors import ConfigError
from tove_llava.core.files import staged
from tove_llava.llava.configuration import ToveLlavaConfig


def export_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str = "hf-llava",
    *,
    dtype: str | None = None,
    chat_begins: bool = True,
) -> list[str]:
    """Writes a trained model as a folder that loads without this package.

    Args:
        model: any folder that training (or ``merge``, ``detach``) wrote.
        out: the folder to write; it must not exist, or be empty.
        format: registered name of the format.
        dtype: of the weights; by default that of the language model in training.
        chat_begins: whether the chat template writes BOS. Servers encode a rendered chat as it is; harnesses, and code
            that calls the processor with a rendered chat, have the tokenizer add BOS, which would then stand twice.

    Returns:
        remarks on this export, one sentence each.

    Raises:
        ConfigError: an unknown format, one that cannot hold this model, or a target that is in use.
        CheckpointError: the model cannot be loaded, or the folder cannot be written; nothing is left behind then.
    """
    writer = FORMATS.get(format)()
    model, out = Path(model), Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; give --out a new folder, or remove that one")
    manifest = Manifest.read(model)
    writer.check(ToveLlavaConfig.from_pretrained(model))
    loaded, processor = load_model(model, dtype=dtype, merge_lora=True)
    source = ExportSource(
        folder=model,
        model=loaded,
        processor=processor,
        template=manifest.template,
        image_aspect_ratio=manifest.image_aspect_ratio,
        language_source=manifest.language["source"],
        stage=manifest.stage,
        preset=manifest.preset,
        chat_begins=chat_begins,
    )
    with staged(out) as folder:
        return writer.write(source, folder)
