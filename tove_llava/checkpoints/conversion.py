"""From one format to another, all of it or nothing; and from any format to a model in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tove_llava.checkpoints.base import FORMATS, Request, find_format
from tove_llava.core.errors import ConfigError
from tove_llava.core.files import staged
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
    """Writes a LLaVA-1.5 checkpoint in another format. Tensors keep their bits; the source is only read.

    Args:
        model: a folder of any format.
        out: the folder to write; it must not exist, or be empty.
        to: registered name of the format.
        preset: a preset, its name or file, whose experts and fusion the new tower gets; its settings of the language
            model but for the weights. Without one the tower is CLIP alone. For ``tove`` only.
        overrides: ``key.path=value`` strings for the preset.
        base: source of the language model (a folder, a hub name), for a source folder that holds none.
        clip: source of CLIP, where the folder does not say it, or says what leads nowhere.
        template: registered name of the conversation template that the model was trained with.

    Returns:
        remarks on this conversion, one sentence each.

    Raises:
        ConfigError: an unknown format or flag, a model that the format cannot hold, or a target that is in use.
        CheckpointError: the source is incomplete or damaged, or the target cannot be written; nothing is left behind.
    """
    writer = FORMATS.get(to)()
    source, target = Path(model), Path(os.path.abspath(out))
    reader = find_format(source)
    if preset is not None and to != "tove":
        raise ConfigError(f"--preset gives a tower experts, which {to} cannot hold; it goes with --to tove")
    if overrides and preset is None:
        raise ConfigError("--set overrides a preset's keys: give --preset too")
    if reader.name == to and preset is None:
        raise ConfigError(f"{source} is of the format {to} already")
    _check_free(target, source)
    if template is not None:
        get_template(template)
    chosen = load_preset(preset, overrides) if isinstance(preset, str) else preset
    request = Request(base=base, clip=clip, template=template, preset=chosen, out=target)
    parts = reader.read(source, request)
    with staged(target) as folder:
        writer.write(parts, folder, request)
    return parts.remarks


def _check_free(out: Path, source: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; give --out a new folder, or remove that one")
    if out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"--out {out} lies in the folder that is read, which stays as it is; choose another place")
