"""Decide if a path leaves the folder that names it; everything in the package asks here."""

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any

from tove_llava.core.errors import CheckpointError, DataError
from tove_llava.core.files import read_json

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_MODEL = ("audio_tokenizer", "audio_tokenizer_name_or_path")  # a processor's keys that load another model


def way_out(folder: str | os.PathLike[str], name: str, links: bool = False) -> str:
    """Tell how a name leads out of a folder; empty if it stays inside.

    A name stays inside if it is relative without leaving by ``..``, or absolute and inside; and if the links on its way
    end inside. The folder may itself be a link. One exception: a snapshot in the hub's cache consists of links to the
    ``blobs`` of its own repository.

    Args:
        folder: what the name is relative to.
        links: accept links that lead out.
    """
    if "\0" in name:
        return "is no file's name in"
    if os.path.isabs(name):
        name = os.path.relpath(os.path.normpath(name), os.path.abspath(folder))
        if _climbs(name):
            return "is an absolute path outside"
    if _climbs(os.path.normpath(name)):
        return "leads out of"
    path = os.path.join(folder, name)
    real = os.path.join(_real(os.path.dirname(path)), os.path.basename(path))
    if os.path.islink(real):
        real = os.path.realpath(real)
    root = _real(os.fspath(folder))
    repository, snapshots, _ = root.rpartition(f"{os.sep}snapshots{os.sep}")
    roots = [root, os.path.join(repository, "blobs")] if snapshots else [root]
    if links or any(os.path.commonpath([each, real]) == each for each in roots):
        return ""
    return f"leads through a link (to {real}) out of"


def name_inside(folder: str | os.PathLike[str], name: str, allow_links: bool = True) -> str:
    """Return an image's name relative to its folder; DataError if it leads out (:func:`way_out`)."""
    if "\\" in name and not os.path.lexists(os.path.join(folder, name)):
        if PureWindowsPath(name).drive:
            raise DataError(f"image {name!r} is an absolute path; give it relative to the image folder {folder}")
        name = name.replace("\\", "/")
    reason = way_out(folder, name, allow_links)
    if reason:
        raise DataError(
            f"image {name!r} {reason} the image folder {folder}; choose the image folder so that the file is inside"
            + (", or follow such links with --allow_image_links" if "through a link" in reason else "")
        )
    return os.path.relpath(os.path.normpath(name), os.path.abspath(folder)) if os.path.isabs(name) else name


def inside(folder: str | os.PathLike[str], name: str, named_by: str = "") -> Path:
    """Return the path of a checkpoint's file; CheckpointError if it leads out of the folder."""
    reason = way_out(folder, name)
    if reason:
        raise CheckpointError(
            f"{Path(folder, named_by)}: {name!r} {reason} the folder, which has to hold the checkpoint's files; copy "
            "the file there, or name another model by its absolute path"
        )
    return Path(folder, name)


def check_folder(folder: Path) -> None:
    """Check that the files of a model's folder, and those they name, lie in it; see :func:`way_out`.

    Raises:
        CheckpointError: one does not, or would load another model or code.
    """
    for entry in os.scandir(folder):
        if entry.is_symlink() and (not entry.is_dir() or entry.name == "additional_chat_templates"):
            inside(folder, entry.name)
        if entry.name.endswith((".safetensors.index.json", ".bin.index.json")):
            weight_map = _read(folder, entry.name).get("weight_map")
            for file in set(_texts(list(weight_map.values()) if isinstance(weight_map, dict) else None)):
                inside(folder, file, entry.name)
    config = _read(folder, "config.json")
    for file in _texts(config.get("transformers_weights")):
        inside(folder, file, "config.json")
    for file in _texts(_read(folder, "tokenizer_config.json").get("fast_tokenizer_files")):
        inside(folder, file, "tokenizer_config.json")
    for key, value in _items(config):
        if key.endswith("attn_implementation") and "/" in str(value):
            raise CheckpointError(
                f"{folder}/config.json: {key} {value!r} is code of the hub, which is not run; remove the key"
            )
    for name in ("processor_config.json", "audio_tokenizer_config.json"):
        if any(key in _read(folder, name) for key in _OTHER_MODEL):
            raise CheckpointError(f"{folder}/{name} names an audio tokenizer, which a LLaVA has not; remove it")


def refuse_pickles(folder: Path) -> None:
    """Raise CheckpointError for a folder whose weights are only pickles."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles and not any(folder.glob("*.safetensors*")):
        raise CheckpointError(
            f"{folder} holds pickled weights ({pickles[0]}), which are not read: they could run code. Convert them to "
            "safetensors: open the folder with its own library, and save it again (model.save_pretrained)"
        )


def check_tree(folder: Path, name: str) -> Path:
    """Return a checkpoint's part, to be copied whole; CheckpointError if a link anywhere in it leads out."""
    for where, folders, files in os.walk(folder / name):
        for each in (*folders, *files):
            inside(folder, os.path.relpath(os.path.join(where, each), folder))
    return folder / name


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object; empty if there is none, which is an error only for those who need it."""
    with suppress(CheckpointError):
        content = read_json(folder / name, CheckpointError)
        return content if isinstance(content, dict) else {}
    return {}


def _texts(value: Any) -> list[str]:
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the pairs of a JSON object and of those in it."""
    for key, item in value.items() if isinstance(value, dict) else ():
        yield key, item
        yield from _items(item)


def _climbs(name: str) -> bool:
    return name == os.pardir or name.startswith(os.pardir + os.sep)


@lru_cache(maxsize=4096)  # each image asks for its folder
def _real(folder: str) -> str:
    return os.path.realpath(folder)
