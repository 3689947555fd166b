"""From a checkpoint to an exported folder, all of it or nothing."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tove_llava.errors import CheckpointError, ConfigError
from tove_llava.export.base import FORMATS, ExportSource
from tove_llava.llava.checkpoint import Manifest, load_model
from tove_llava.llava.configuration import ToveLlavaConfig


def export_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str = "hf-llava",
    *,
    dtype: str | None = None,
) -> list[str]:
    """Writes a trained model as a folder that loads without this package.

    Args:
        model: any folder that training (or ``merge``, ``detach``) wrote.
        out: the folder to write; it must not exist, or be empty.
        format: registered name of the format.
        dtype: of the weights; by default that of the language model in training.

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
    )
    with staged(out) as folder:
        return writer.write(source, folder)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out`` that becomes ``out`` when the block ends well, and is removed when it does not.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {out}: {error}") from error
    try:
        yield stage
        mask = _umask()
        for path in (*sorted(stage.rglob("*"), reverse=True), stage):
            # mkdtemp and safetensors give the owner alone rights.
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
            _sync(path)
        os.replace(stage, out)
        _sync(out.parent)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise CheckpointError(
                f"{out} could not be written ({error}); nothing was left behind. Make room on that disk, or give --out "
                "a folder on another one"
            ) from error
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
