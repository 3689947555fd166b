"""What a scene is, and how one is drawn from a seed.

World coordinates are in metres, z up, ground at z = 0. A point's depth is its distance along the camera's optical
axis, its position (u, v) lies in 0..1 from the picture's left and top.
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

# These pairs occur in no training scene of any kind: they test whether a model composes what it knows.
HELD_OUT_PAIRS = frozenset({("purple", "cone"), ("cyan", "cube"), ("orange", "sphere"), ("white", "cylinder")})

# A split is a random stream of its own. "parts" is what the bundled CLIP, experts and language model were trained on;
# "val" and "novel" (scenes with held-out pairs) were seen by nothing.
SPLITS = {"train": 0, "val": 1, "novel": 2, "parts": 3}

MIN_RADIUS, MAX_RADIUS = 0.32, 1.0
MIN_OBJECTS, MAX_OBJECTS = 2, 5
MIN_VISIBLE_SHARE = 0.45  # of an object's own silhouette
MIN_VISIBLE_AREA = 0.006  # of the picture
CHECK_SIZE = 48  # pixels per side of the draft on which visibility is judged, whatever size is rendered afterwards


@dataclass
class Camera:
    """A pinhole camera with orthonormal axes; ``tangent`` is tan(half the field of view)."""

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
        """(u, v, depth) of a world point."""
        offset = np.asarray(point) - np.asarray(self.position)
        depth = float(offset @ np.asarray(self.forward))
        u = 0.5 + 0.5 * float(offset @ np.asarray(self.right)) / (depth * self.tangent)
        v = 0.5 - 0.5 * float(offset @ np.asarray(self.up)) / (depth * self.tangent)
        return u, v, depth


@dataclass
class Object:
    """One solid. ``radius`` is half its height; ``u, v, depth, area`` describe its visible part in the picture."""

    shape: str
    colour: str
    material: str
    radius: float
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
        """The words that single this object out; colour and shape together are unique in a scene."""
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


def scene_rng(seed: int, split: str, index: int, purpose: int = 0) -> np.random.Generator:
    """The random stream of one scene: independent between seeds, splits, scenes and purposes (0 world, 1 language)."""
    return np.random.default_rng([seed, SPLITS[split], index, purpose])


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """Scene number ``index`` of a split.

    The same arguments give the same scene on one platform and set of versions. Every object is visible enough to be
    asked about, and no two objects share both colour and shape.
    """
    rng = scene_rng(seed, split, index)
    while True:
        scene = _draft(rng, seed, split, index)
        if scene is not None:
            return scene


def _draft(rng: np.random.Generator, seed: int, split: str, index: int) -> Scene | None:
    from tove_llava.scenes.render import silhouettes

    scene = Scene(
        seed=seed,
        split=split,
        index=index,
        camera=_sample_camera(rng),
        light=_unit(np.array([rng.uniform(-0.8, 0.8), rng.uniform(-0.9, 0.1), rng.uniform(0.7, 1.2)])),
        ambient=float(rng.uniform(0.3, 0.5)),
        ground=_tone(rng, 0.35, 0.65),
        sky=_tone(rng, 0.6, 0.95),
    )
    wanted = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    pairs = _sample_pairs(rng, split, wanted + 1)  # one spare, should an object turn out hidden
    for colour, shape in pairs:
        placed = _place(rng, scene, colour, shape)
        if placed is not None:
            scene.objects.append(placed)
    visible = []
    for item, (share, area, u, v) in zip(scene.objects, silhouettes(scene, CHECK_SIZE), strict=True):
        if share >= MIN_VISIBLE_SHARE and area >= MIN_VISIBLE_AREA:
            item.u, item.v, item.area = u, v, area
            item.depth = scene.camera.project(np.asarray(item.centre))[2]
            visible.append(item)
    if len(visible) < wanted:
        return None
    scene.objects = visible[:wanted]  # taking objects out only uncovers the others
    for item, (_, area, u, v) in zip(scene.objects, silhouettes(scene, CHECK_SIZE), strict=True):
        item.u, item.v, item.area = u, v, area
    if split == "novel" and not any(item.pair in HELD_OUT_PAIRS for item in scene.objects):
        return None
    return scene


def _sample_camera(rng: np.random.Generator) -> Camera:
    # Height and pitch vary widely, so that the height in the picture does not tell the distance.
    distance, height = rng.uniform(6.0, 8.5), rng.uniform(0.7, 5.5)
    position = np.array([rng.uniform(-1.0, 1.0), -distance, height])
    target = np.array([rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 1.5), rng.uniform(0.3, 1.6)])
    return Camera.look_at(position, target, fov_degrees=float(rng.uniform(42, 55)))


def _sample_pairs(rng: np.random.Generator, split: str, count: int) -> list[tuple[str, str]]:
    pairs = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if split == "novel" or (colour, shape) not in HELD_OUT_PAIRS
    ]
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:count]]
    if split == "novel":  # at least one held-out pair, anywhere in the list
        held_out = sorted(HELD_OUT_PAIRS)[int(rng.integers(len(HELD_OUT_PAIRS)))]
        if held_out not in chosen:
            chosen[0] = held_out
    # Repeat a colour or a shape now and then, or counting would nearly always answer "one".
    if rng.random() < 0.6:
        for i in range(1, len(chosen)):
            if rng.random() < 0.5:
                same_colour = rng.random() < 0.5
                options = [
                    p
                    for p in pairs
                    if p not in chosen and p[0 if same_colour else 1] == chosen[0][0 if same_colour else 1]
                ]
                if options:
                    chosen[i] = options[int(rng.integers(len(options)))]
    return chosen


def _place(rng: np.random.Generator, scene: Scene, colour: str, shape: str) -> Object | None:
    for _ in range(12):
        radius = float(rng.uniform(MIN_RADIUS, MAX_RADIUS))
        manner = rng.random()
        bases = [o for o in scene.objects if o.shape in ("cube", "cylinder") and o.radius >= 0.6 * radius]
        if manner < 0.2 and bases:  # stands on another object
            base = bases[int(rng.integers(len(bases)))]
            centre = (base.centre[0], base.centre[1], base.centre[2] + base.radius + radius)
            ignore: Object | None = base
        else:  # on the ground, or floating
            x, y = rng.uniform(-3.2, 3.2), rng.uniform(-3.5, 5.0)
            lift = rng.uniform(0.4, 2.2) if manner > 0.6 else 0.0
            centre, ignore = (float(x), float(y), float(radius + lift)), None
        u, v, depth = scene.camera.project(np.asarray(centre))
        if not (0.1 < u < 0.9 and 0.1 < v < 0.9 and depth > 2.5):
            continue
        clear = all(
            other is ignore or np.linalg.norm(np.subtract(centre, other.centre)) > 1.25 * (radius + other.radius)
            for other in scene.objects
        )
        if clear:
            material = MATERIALS[int(rng.integers(len(MATERIALS)))]
            return Object(shape, colour, material, radius, centre, float(rng.uniform(0, np.pi / 2)), depth=depth)
    return None


def _unit(vector: np.ndarray) -> tuple[float, float, float]:
    vector = vector / np.linalg.norm(vector)
    return float(vector[0]), float(vector[1]), float(vector[2])


def _tone(rng: np.random.Generator, low: float, high: float) -> tuple[float, float, float]:
    tone = rng.uniform(low, high) + rng.uniform(-0.06, 0.06, size=3)
    return float(tone[0]), float(tone[1]), float(tone[2])
