"""Figures from papers, shown apart from measured ones and marked as published.

One YAML file a model in ``published/``::

    name: LLaVA-1.5 7B
    paper: Improved Baselines with Visual Instruction Tuning
    arxiv: "2310.03744"
    source: table that the figures were read from
    url: its address
    note: differences from how this package measures (optional)
    scores:
      gqa: {accuracy: 62.0}          # benchmark -> label of the scorer's table -> figure
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import yaml

from tove_llava.core.errors import ConfigError
from tove_llava.core.mappings import from_mapping


@dataclass(frozen=True)
class Published:
    """Figures of one model by its authors; fields as in the file."""

    key: str
    name: str
    paper: str
    arxiv: str
    source: str
    url: str
    scores: Mapping[str, Mapping[str, float]]
    note: str = ""


def read_published() -> dict[str, Published]:
    """Read all models, by the name of their file.

    Raises:
        ConfigError: a file is malformed.
    """
    files = sorted(resources.files(__package__).joinpath("published").iterdir(), key=lambda file: file.name)
    return {file.name[:-5]: _parse(file.name, file.read_text("utf-8")) for file in files if file.name.endswith(".yaml")}


def _parse(name: str, text: str) -> Published:
    return from_mapping(Published, yaml.safe_load(text), f"published figures {name}", key=name[:-5])


def choose_published(names: str, benchmarks: Sequence[str]) -> list[Published]:
    """Choose models to show with these benchmarks.

    Args:
        names: "all", "none", or file names separated by commas.

    Raises:
        ConfigError: no model has that name.
    """
    known = read_published()
    if names == "none":
        return []
    chosen = list(known) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ConfigError(f"no published figures of {unknown[0]!r}; there are: {', '.join(known)}, or all, or none")
    return [known[name] for name in chosen if set(known[name].scores) & set(benchmarks)]
