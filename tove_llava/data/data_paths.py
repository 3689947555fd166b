"""Name data files and their weights in one text: ``a.jsonl,b.parquet:0.5``."""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from tove_llava.core.errors import ConfigError
from tove_llava.core.files import read_text
from tove_llava.core.mappings import parse_yaml

_YAML = (".yaml", ".yml")


class DataPath(NamedTuple):
    """A data file, and how often an epoch goes through its records."""

    path: Path
    weight: float = 1.0


def data_paths(text: str | os.PathLike[str]) -> list[DataPath]:
    """Read the files that ``--data_path`` names.

    Args:
        text: a path, whatever its characters; or paths with commas between them, each with its weight after a colon if
            that is not 1; or a YAML file, a list of paths and of ``{path, weight}``.

    Raises:
        ConfigError: a path is empty, or a weight is not a positive number.
    """
    text = os.fspath(text)
    if text.lower().endswith(_YAML) and os.path.isfile(text):
        return _listed(Path(text))
    return [DataPath(Path(text))] if os.path.exists(text) else [_entry(part, text) for part in text.split(",")]


def _entry(part: str, text: str) -> DataPath:
    part = part.strip()
    path, colon, weight = part.rpartition(":")
    if not part or (colon and not path):
        raise ConfigError(f"{text!r} has an empty path; write a.jsonl,b.parquet:0.5")
    if not colon or os.path.exists(part):
        return DataPath(Path(part))
    if not os.path.exists(path) and not _is_number(weight):
        return DataPath(Path(part))  # a path with a colon, that is not there
    return DataPath(Path(path), _weight(weight, path))


def _listed(file: Path) -> list[DataPath]:
    entries = parse_yaml(read_text(file, ConfigError), str(file))
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{file} must be a list of data files, each a path or {{path, weight}}")
    found = []
    for entry in entries:
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or entry.keys() - {"path", "weight"}:
            raise ConfigError(f"{file}: an entry must be a path or {{path, weight}}, not {entry!r}")
        path = file.parent / entry["path"]
        found.append(DataPath(path, _weight(entry.get("weight", 1.0), str(path))))
    return found


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return not isinstance(text, bool)


def _weight(value: Any, path: str) -> float:
    weight = float(value) if _is_number(value) else math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"{path}: the weight must be a positive number such as 0.5, not {value!r}")
    return weight


def described(text: str | os.PathLike[str], whole: bool = True) -> str:
    """Write the files that a text names, with whole paths or only with names."""
    entries = data_paths(text)
    paths = [str(entry.path.resolve()) if whole else entry.path.name for entry in entries]
    return ",".join(
        path if entry.weight == 1 else f"{path}:{entry.weight:g}" for path, entry in zip(paths, entries, strict=True)
    )


def size_of(text: str | os.PathLike[str]) -> int:
    """Sum the bytes of the files that a text names; ConfigError if one cannot be read."""
    files: list[Path] = []
    try:
        for entry in data_paths(text):
            files += filter(Path.is_file, entry.path.rglob("*")) if entry.path.is_dir() else [entry.path]
        return sum(file.stat().st_size for file in files)
    except OSError as error:
        raise ConfigError(f"the data {text} cannot be read: {error}") from error
