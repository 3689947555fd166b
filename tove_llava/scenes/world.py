"""Draw a scene from a seed."""

import numpy as np

from tove_llava.scenes.objects import COLOURS, MATERIALS, SHAPES, Camera, Object, Scene
from tove_llava.scenes.render import silhouettes

# No training scene of any kind has these pairs: they test whether a model composes what it knows.
HELD_OUT_PAIRS = frozenset({("purple", "cone"), ("cyan", "cube"), ("orange", "sphere"), ("white", "cylinder")})

# Each split has its own random stream. The bundled parts (CLIP, experts, language model) were trained on "parts", and
# nothing on "val" and "novel" (scenes with held-out pairs).
SPLITS = {"train": 0, "val": 1, "novel": 2, "parts": 3}

MIN_RADIUS, MAX_RADIUS = 0.32, 1.0
MIN_OBJECTS, MAX_OBJECTS = 2, 5
MIN_VISIBLE_SHARE = 0.45  # of an object's own silhouette
MIN_VISIBLE_AREA = 0.006  # of the image
CHECK_SIZE = 48  # pixels per side of the draft that decides visibility


def scene_rng(seed: int, split: str, index: int, purpose: int = 0) -> np.random.Generator:
    """Make a scene's random stream (0 world, 1 language, 2 POPE)."""
    return np.random.default_rng([seed, SPLITS[split], index, purpose])


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """Draw scene number ``index`` of a split.

    The same arguments give the same scene on one platform and set of versions. Every object is visible enough for
    questions, and no two objects share both colour and shape.
    """
    rng = scene_rng(seed, split, index)
    while True:
        scene = _draft(rng, seed, split, index)
        if scene is not None:
            return scene


def _draft(rng: np.random.Generator, seed: int, split: str, index: int) -> Scene | None:
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
    pairs = _sample_pairs(rng, split, wanted + 1)  # a spare one, in case an object is hidden
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
    scene.objects = visible[:wanted]  # without an object the others are at least as visible
    for item, (_, area, u, v) in zip(scene.objects, silhouettes(scene, CHECK_SIZE), strict=True):
        item.u, item.v, item.area = u, v, area
    if split == "novel" and not any(item.pair in HELD_OUT_PAIRS for item in scene.objects):
        return None
    return scene


def _sample_camera(rng: np.random.Generator) -> Camera:
    # Height and pitch vary widely, so that height in the image does not give the distance away.
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
    # Repeat a colour or a shape now and then: otherwise counting would nearly always answer "one".
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
