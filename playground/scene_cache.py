"""Training scenes of the bundled parts, rendered once in shards."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tove_llava.scenes import Rendering, caption, render, sample_scene
from tove_llava.scenes.render import CLASSES, FAR, SKY
from tove_llava.scenes.world import scene_rng

SIZE = 96  # pixels per side of an image
CELL = 4  # pixels per side of a target's cell: the experts' output has a quarter of the resolution
SHARD = 1000
CAPTIONS = 8  # different captions of one scene
DEPTH_SCALE = 2.0  # metres; brings the inverse depth of most surfaces to 0.1..0.8
FOLDER = Path(__file__).parent / "data" / "parts"


@dataclass
class Scenes:
    """``n`` scenes, with targets at quarter resolution, ``g = SIZE / CELL``.

    Attributes:
        image: uint8 [n, SIZE, SIZE, 3].
        depth: float16 [n, g, g, 1], mean of :func:`inverse_depth`.
        normal: float16 [n, g, g, 3], unit vectors; (0, 0, -1), which no visible surface has, for the sky.
        edge: uint8 [n, g, g, 1], 1 where the cell holds an edge pixel.
        segmentation: uint8 [n, g, g, 6], pixels of each class in the cell.
        captions: for each scene ``CAPTIONS`` sentences; empty when they were not asked for.
    """

    image: np.ndarray
    depth: np.ndarray
    normal: np.ndarray
    edge: np.ndarray
    segmentation: np.ndarray
    captions: list[list[str]]


def inverse_depth(depth: np.ndarray) -> np.ndarray:
    """Map metres to scaled inverse depth less that of ``FAR``, the sky."""
    return DEPTH_SCALE * (1.0 / depth - 1.0 / FAR)


def metres(inverse: np.ndarray) -> np.ndarray:
    """Invert :func:`inverse_depth`; values below zero count as the sky."""
    return 1.0 / (np.maximum(inverse, 0.0) / DEPTH_SCALE + 1.0 / FAR)


def targets(view: Rendering) -> dict[str, np.ndarray]:
    """Make each expert's target of a rendering, shaped as in :class:`Scenes`."""
    normals = view.normals.copy()
    normals[view.instances == SKY] = (0.0, 0.0, -1.0)
    normal = _cells(normals).mean((1, 3))
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    one_hot = view.classes[..., None] == np.arange(len(CLASSES))
    return {
        "depth": _cells(inverse_depth(view.depth)[..., None]).mean((1, 3)).astype(np.float16),
        "normal": normal.astype(np.float16),
        "edge": _cells(view.edges[..., None]).any((1, 3)).astype(np.uint8),
        "segmentation": _cells(one_hot).sum((1, 3)).astype(np.uint8),
    }


def load_scenes(count: int, seed: int, *, with_captions: bool = False, folder: Path = FOLDER) -> Scenes:
    """Return the first scenes of "parts", rendering those not cached."""
    folder = folder / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range((count + SHARD - 1) // SHARD)
    shards = [_shard(folder, seed, number) for number in numbers]
    maps = {key: np.concatenate([shard[key] for shard in shards])[:count] for key in shards[0]}
    captions = [row for number in numbers for row in _captions(folder, seed, number)] if with_captions else []
    return Scenes(**maps, captions=captions[:count])


def held_out(count: int, seed: int) -> list[Rendering]:
    """Render scenes of the split "val", which no part has seen."""
    return [render(sample_scene(seed, "val", i), SIZE) for i in range(count)]


def _cells(image: np.ndarray) -> np.ndarray:
    """Reshape [S, S, c] to [g, CELL, g, CELL, c]."""
    grid = image.shape[0] // CELL
    return image.reshape(grid, CELL, grid, CELL, -1)


def _shard(folder: Path, seed: int, number: int) -> dict[str, np.ndarray]:
    file = folder / f"{number:04d}.npz"
    if not file.exists():
        start, rows = time.time(), []
        for index in range(number * SHARD, (number + 1) * SHARD):
            view = render(sample_scene(seed, "parts", index), SIZE)
            rows.append({"image": view.image, **targets(view)})
        unfinished = file.with_suffix(".part.npz")
        np.savez(unfinished, **{key: np.stack([row[key] for row in rows]) for key in rows[0]})
        unfinished.replace(file)
        rate = SHARD / (time.time() - start)
        print(f"rendered scenes {number * SHARD}-{(number + 1) * SHARD - 1} ({rate:.0f} scenes/s)", file=sys.stderr)
    with np.load(file) as stored:
        return dict(stored)


def _captions(folder: Path, seed: int, number: int) -> list[list[str]]:
    file = folder / f"{number:04d}.json"
    if not file.exists():
        rows = []
        for index in range(number * SHARD, (number + 1) * SHARD):
            scene, rng = sample_scene(seed, "parts", index), scene_rng(seed, "parts", index, purpose=1)
            rows.append([caption(scene, rng) for _ in range(CAPTIONS)])
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(rows))
        unfinished.replace(file)
    return json.loads(file.read_text())
