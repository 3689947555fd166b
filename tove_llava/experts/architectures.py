"""Public configurations as data: shapes, parameters and GFLOPs without a network."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

_FILE = Path(__file__).with_name("architectures.yaml")


@cache
def _table() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(_FILE.read_text())


def known_architecture(source: str) -> dict[str, Any] | None:
    """Look up the entry (``config``, ``preprocessor``, ``licence``) of a source, or None."""
    return _table().get(source)
