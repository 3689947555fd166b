"""One entry of a preset's expert list."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tove_llava.core.errors import ConfigError
from tove_llava.core.mappings import from_mapping

MODES = ("features", "map")


@dataclass(frozen=True)
class ExpertSpec:
    """What an expert is, before any weight is loaded.

    Attributes:
        name: unique in the hub, such as "depth".
        expert: the registered expert; ``name`` when left out.
        source: where the weights are (:mod:`tove_llava.core.sources`); the expert's default when left out.
        revision: commit, branch or tag of a hub source.
        mode: "features" for the encoder's own tokens, "map" for the dense prediction.
        image_size: pixels per side that this expert works at; the source's own when left out.
        width, grid: channels and (rows, columns) of what the expert returns; filled in by
            :func:`tove_llava.experts.complete_specs` and then recorded, so that trainable parts need no source.
        options: keys that the registered expert understands; see its class.
    """

    name: str
    expert: str = ""
    source: str = ""
    revision: str | None = None
    mode: str = "features"
    image_size: int | None = None
    width: int = 0
    grid: tuple[int, int] = (0, 0)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ConfigError(f"expert name {self.name!r} must be one word of letters, digits and underscores")
        if self.mode not in MODES:
            raise ConfigError(f"expert {self.name!r}: mode {self.mode!r} is not one of {', '.join(MODES)}")
        size = self.image_size
        if size is not None and (not isinstance(size, int) or size <= 0):
            raise ConfigError(f"expert {self.name!r}: image_size {size!r} must be a positive number of pixels")
        if len(self.grid) != 2:
            raise ConfigError(f"expert {self.name!r}: grid {self.grid!r} must be (rows, columns)")
        object.__setattr__(self, "expert", self.expert or self.name)
        object.__setattr__(self, "grid", (int(self.grid[0]), int(self.grid[1])))
        object.__setattr__(self, "options", dict(self.options or {}))

    @property
    def is_complete(self) -> bool:
        """Whether width and grid have been filled in."""
        return self.width > 0 and min(self.grid) > 0

    @classmethod
    def from_dict(cls, entry: "dict[str, Any] | ExpertSpec") -> "ExpertSpec":
        """Reads a preset's or a config's entry.

        Raises:
            ConfigError: a key is unknown (the message names it and the nearest known one), missing, or ill-valued.
        """
        if isinstance(entry, ExpertSpec):
            return entry
        if not isinstance(entry, dict):
            raise ConfigError(f"an expert is a mapping with a 'name'; got {entry!r}")
        return from_mapping(cls, entry, f"expert {entry.get('name', '?')!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a config or a YAML file; ``from_dict`` reads it back."""
        return {**dataclasses.asdict(self), "grid": list(self.grid)}

    def replace(self, **changes: Any) -> "ExpertSpec":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
