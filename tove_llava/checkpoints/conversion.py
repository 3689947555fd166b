"""Write a model folder in another format, complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tove_llava.checkpoints.base import FORMATS, LlavaFormat, Request, check_request
from tove_llava.checkpoints.formats.tove import MergedAdapters
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.core.errors import ConfigError
from tove_llava.core.files import staged
from tove_llava.core.locks import locked_target
from tove_llava.data import get_template
from tove_llava.presets import Preset, load_preset


def convert_checkpoint(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "tove",
    *,
    preset: str | Preset | None = None,
    overrides: Sequence[str] = (),
    base: str | None = None,
    clip: str | None = None,
    template: str | None = None,
) -> list[str]:
    """Write a LLaVA-1.5 checkpoint in another format.

    Tensors keep their bits; the source is only read.

    Args:
        model: a folder of any format.
        out: the folder to write; it must not exist, or be empty.
        to: registered name of the format.
        preset: a preset, its name or file. It gives the new tower its experts and fusion, and the language model its
            settings except the weights. Without one the tower is only CLIP. For ``tove`` only.
        overrides: ``key.path=value`` strings for the preset.
        base: source of the language model (a folder, a hub name), for a source folder that holds none.
        clip: source of CLIP, if the folder names none or one that does not exist.
        template: registered name of the conversation template that the model was trained with.

    Returns:
        remarks, one sentence each.

    Raises:
        ConfigError: an unknown format or flag, a model that the format cannot hold, or a target that is in use.
        CheckpointError: the source is damaged, or the target cannot be written. An error leaves no files.
        BusyError: another process writes the target.

    Example:
        >>> remarks = tove_llava.convert_checkpoint(llava, "converted")  # a LLaVA-1.5 becomes a folder of this package
        >>> tove_llava.load_model("converted")[0].tower.config.fusion
        'none'
    """
    writer = FORMATS.get(to)()
    if overrides and preset is None:
        raise ConfigError("--set overrides a preset's keys: give --preset too")
    if Path(out).resolve().is_relative_to(Path(model).resolve()):
        raise ConfigError(f"--out {out} lies in the folder that is read, which stays as it is; choose another place")
    if template is not None:
        get_template(template)
    chosen = load_preset(preset, overrides) if isinstance(preset, str) else preset
    return _write(writer, model, out, base=base, clip=clip, template=template, preset=chosen)


def export_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str = "hf-llava",
    *,
    dtype: str | None = None,
    chat_begins: bool = True,
) -> list[str]:
    """Write a trained model as a folder that loads without this package.

    Args:
        model: any folder that training (or ``merge``, ``detach``) wrote.
        out: the folder to write; it must not exist, or be empty.
        format: registered name of the format.
        dtype: of the weights; by default that of the language model in training.
        chat_begins: the chat template writes BOS. Servers encode a rendered chat unchanged, so they need it. Harnesses,
            and code that calls the processor with a rendered chat, have the tokenizer add BOS, and would then have two.

    Returns:
        remarks, one sentence each.

    Raises:
        as :func:`convert_checkpoint`.
    """
    bos = "template" if chat_begins else "tokenizer"
    return _write(FORMATS.get(format)(), model, out, dtype=dtype, bos=bos)


def merge_lora(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    self_contained: bool = False,
) -> Manifest:
    """Write a model's adapters into its language model's weights.

    The sum is ``W + alpha / r * B A``, where ``W`` is what the adapters were trained on: the language model's own
    weights or, if these were quantised, the values that quantisation left. CLIP and the experts are named as before.

    Args:
        model: a folder that LoRA or QLoRA training wrote.
        out: the folder to write; it must not exist, or be empty.
        dtype: of the weights, and of the sum; that of the language model in training by default.
        self_contained: write CLIP and the experts as well; always so if ``model`` has them by value.

    Returns:
        the manifest of the new folder.

    Raises:
        as :func:`convert_checkpoint`; ConfigError too if the model has no adapters.
    """
    _write(MergedAdapters(), model, out, dtype=dtype, self_contained=self_contained)
    return Manifest.read(out)


def _write(
    writer: LlavaFormat, model: str | os.PathLike[str], out: str | os.PathLike[str], **settings: object
) -> list[str]:
    target = Path(os.path.abspath(out))
    request = Request(**settings, out=target)  # type: ignore[arg-type]
    check_request(writer, request)
    with locked_target(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{out} exists and is not empty; give --out a new folder, or remove that one")
        source = writer.open(Path(model), request)
        with staged(target) as folder:
            writer.write(source, folder, request)
    remarks: list[str] = source.remarks
    return remarks
