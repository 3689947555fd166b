"""The objects of a scene: camera, solids, and the scene itself.

World coordinates are in metres, z up, ground at z = 0. A point's depth is its distance along the camera's optical
axis; (u, v) in 0..1 count from the image's left and top.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.15, 0.65, 0.18),
    "blue": (0.15, 0.28, 0.88),
    "yellow": (0.93, 0.85, 0.15),
    "purple": (0.58, 0.18, 0.72),
    "cyan": (0.15, 0.80, 0.82),
    "orange": (0.95, 0.52, 0.10),
    "white": (0.92, 0.92, 0.92),
}
MATERIALS = ("matte", "shiny")


@dataclass
class Camera:
    """A pinhole camera; ``tangent`` is tan(half the field of view)."""

    position: tuple[float, float, float]
    forward: tuple[float, float, float]
    right: tuple[float, float, float]
    up: tuple[float, float, float]
    tangent: float

    @classmethod
    def look_at(cls, position: np.ndarray, target: np.ndarray, fov_degrees: float) -> "Camera":
        forward = target - position
        forward = forward / np.linalg.norm(forward)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right = right / np.linalg.norm(right)
        up = np.cross(right, forward)
        as_tuple = [tuple(float(x) for x in vector) for vector in (position, forward, right, up)]
        return cls(*as_tuple, tangent=float(np.tan(np.radians(fov_degrees) / 2)))  # type: ignore[arg-type, misc]

    def project(self, point: np.ndarray) -> tuple[float, float, float]:
        """Return (u, v, depth) of a world point."""
        offset = np.asarray(point) - np.asarray(self.position)
        depth = float(offset @ np.asarray(self.forward))
        u = 0.5 + 0.5 * float(offset @ np.asarray(self.right)) / (depth * self.tangent)
        v = 0.5 - 0.5 * float(offset @ np.asarray(self.up)) / (depth * self.tangent)
        return u, v, depth


@dataclass
class Object:
    """One solid; ``u, v, depth, area`` describe its visible part."""

    shape: str
    colour: str
    material: str
    radius: float  # half the height
    centre: tuple[float, float, float]
    angle: float
    u: float = 0.0
    v: float = 0.0
    depth: float = 0.0
    area: float = 0.0

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def name(self) -> str:
        """Return colour and shape, which identify an object within a scene."""
        return f"{self.colour} {self.shape}"


@dataclass
class Scene:
    """A world, the camera that looks at it, and the light."""

    seed: int
    split: str
    index: int
    camera: Camera
    light: tuple[float, float, float]
    ambient: float
    ground: tuple[float, float, float]
    sky: tuple[float, float, float]
    objects: list[Object] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
