"""Fixed data that scoring rules need. Each file names its source."""

from functools import lru_cache
from importlib import resources
from typing import Any

from tove_llava.core.json_text import loads


@lru_cache
def scorer_data(name: str) -> dict[str, Any]:
    """Read the table of ``NAME.json`` in this folder."""
    text = resources.files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    return loads(text)["table"]
