"""One entry of a preset's expert list."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tove_llava.core.errors import ConfigError
from tove_llava.core.mappings import from_mapping

MODES = ("features", "map")


@dataclass(frozen=True)
class ExpertSpec:
    """The description of an expert, before any weight is loaded.

    Attributes:
        name: unique in the hub, such as "depth".
        expert: the registered expert; ``name`` by default.
        source: source of the weights (:mod:`tove_llava.core.sources`); the expert's own by default.
        revision: commit, branch or tag of a hub source.
        mode: "features" for the encoder's own tokens, "map" for the dense prediction.
        image_size: pixels per side of the expert's input; the source's own by default.
        width, grid: channels and (rows, columns) of the expert's output, which
            :func:`tove_llava.experts.complete_specs` fills in, so that trainable parts need no source.
        options: keys that the registered expert understands; see its class.

    Raises:
        ConfigError: a value that no expert can have.

    Example:
        >>> spec = tove_llava.ExpertSpec("near", expert="depth", source="bundled:depth", mode="map")
        >>> spec.replace(image_size=64).image_size, spec.is_complete
        (64, False)
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
        """Tell if width and grid are filled in."""
        return self.width > 0 and min(self.grid) > 0

    @classmethod
    def from_dict(cls, entry: "dict[str, Any] | ExpertSpec") -> "ExpertSpec":
        """Read an entry of a preset or config; ConfigError names a fault."""
        if isinstance(entry, ExpertSpec):
            return entry
        if not isinstance(entry, dict):
            raise ConfigError(f"an expert is a mapping with a 'name'; got {entry!r}")
        return from_mapping(cls, entry, f"expert {entry.get('name', '?')!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a config or YAML, which ``from_dict`` reads."""
        return {**dataclasses.asdict(self), "grid": list(self.grid)}

    def replace(self, **changes: Any) -> "ExpertSpec":
        """Copy with some fields changed."""
        return dataclasses.replace(self, **changes)
