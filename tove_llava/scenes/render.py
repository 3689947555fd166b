"""Cast rays into a scene, for its image and all exact maps.

Rays are ``origin + t * direction`` with directions scaled so that ``t`` is the depth along the optical axis. Each
object is intersected only inside the rectangle that its bounding sphere covers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tove_llava.scenes.objects import COLOURS, SHAPES, Object, Scene

CLASSES = ("sky", "ground", *SHAPES)
SKY, GROUND = -2, -1  # instance ids where there is no object
FAR = 40.0  # metres; the sky's depth
CREASE = np.cos(np.radians(35.0))  # edges are turns of the surface sharper than this

Hit = tuple[np.ndarray, np.ndarray]  # depth [n] (inf where missed), outward normal [n, 3]


@dataclass
class Rendering:
    """All maps of one image of side S.

    Attributes:
        image: uint8 [S, S, 3], RGB.
        depth: float32 [S, S], metres along the optical axis, ``FAR`` for the sky.
        normals: float32 [S, S, 3], unit vectors in camera axes (right, up, towards the viewer); zero for the sky.
        instances: int16 [S, S], index into the scene's objects, ``GROUND`` or ``SKY``.
        classes: uint8 [S, S], index into ``CLASSES``.
        edges: bool [S, S], outlines of objects and creases of their surfaces.
    """

    image: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    instances: np.ndarray
    classes: np.ndarray
    edges: np.ndarray


def render(scene: Scene, size: int = 96) -> Rendering:
    """Render a scene as a square of ``size`` pixels."""
    depth, normals, instances, points = _cast(scene, size)
    camera = scene.camera
    axes = np.stack([camera.right, camera.up, -np.asarray(camera.forward)], axis=1).astype(np.float32)  # [3, 3]
    view_normals = normals @ axes  # [S*S, 3]
    lookup = np.array([SHAPES.index(o.shape) + 2 for o in scene.objects] + [0, 1], dtype=np.uint8)
    classes = lookup[instances]  # ids -2 and -1 index the list's end
    shape = (size, size)
    edges = _edges(instances.reshape(shape), view_normals.reshape(*shape, 3))
    image = _shade(scene, depth, normals, instances, points)
    return Rendering(
        image=image.reshape(*shape, 3),
        depth=depth.reshape(shape),
        normals=view_normals.reshape(*shape, 3),
        instances=instances.reshape(shape),
        classes=classes.reshape(shape),
        edges=edges,
    )


def silhouettes(scene: Scene, size: int) -> list[tuple[float, float, float, float]]:
    """Return each object's visible shares (silhouette, image) and visible centroid (u, v)."""
    owner, outlines = _owners(scene, size)
    found = []
    for index, outline in enumerate(outlines):
        mine = np.flatnonzero(owner == index)
        if len(mine) == 0:
            found.append((0.0, 0.0, 0.5, 0.5))
            continue
        u, v = (mine % size + 0.5).mean() / size, (mine // size + 0.5).mean() / size
        found.append((len(mine) / outline, len(mine) / size**2, float(u), float(v)))
    return found


def coverage(scene: Scene, grid: int, size: int = 48) -> np.ndarray:
    """Return each object's visible share of each cell, float32 [grid, grid, objects]."""
    owner, _ = _owners(scene, size)
    masks = owner[:, None] == np.arange(len(scene.objects))  # [S*S, objects]
    cell = size // grid
    return masks.reshape(grid, cell, grid, cell, -1).mean(axis=(1, 3), dtype=np.float32)


def _owners(scene: Scene, size: int) -> tuple[np.ndarray, list[int]]:
    """Return each pixel's object [S*S] and each whole silhouette's pixel count."""
    directions = _directions(scene, size)
    nearest = np.full(size * size, np.inf, dtype=np.float32)
    owner = np.full(size * size, SKY, dtype=np.int16)
    outlines = []
    for index, item in enumerate(scene.objects):
        pixels = _footprint(scene, item, size)
        depth, _ = _intersect(scene, item, directions[pixels])
        hit = np.isfinite(depth)
        outlines.append(int(hit.sum()))
        closer = depth < nearest[pixels]
        nearest[pixels[closer]] = depth[closer]
        owner[pixels[closer]] = index
    return owner, outlines


def _directions(scene: Scene, size: int) -> np.ndarray:
    camera = scene.camera
    steps = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1) * camera.tangent
    forward, right, up = (np.asarray(v, dtype=np.float32) for v in (camera.forward, camera.right, camera.up))
    grid = forward + steps[None, :, None] * right - steps[:, None, None] * up  # [S, S, 3]
    return grid.reshape(-1, 3)


def _footprint(scene: Scene, item: Object, size: int) -> np.ndarray:
    """Return the indices of pixels that the object's bounding sphere may cover."""
    u, v, depth = scene.camera.project(np.asarray(item.centre))
    bound = 1.5 * item.radius
    half = 0.5 * bound / (max(depth - bound, 0.2) * scene.camera.tangent)
    left, right = (int(np.clip(np.floor((u + s * half) * size), 0, size)) for s in (-1, 1))
    top, bottom = (int(np.clip(np.floor((v + s * half) * size), 0, size)) for s in (-1, 1))
    rows, columns = np.arange(top, min(bottom + 1, size)), np.arange(left, min(right + 1, size))
    return (rows[:, None] * size + columns[None, :]).reshape(-1)


def _cast(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    origin = np.asarray(scene.camera.position, dtype=np.float32)
    directions = _directions(scene, size)  # [S*S, 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.where(directions[:, 2] < -1e-4, -origin[2] / directions[:, 2], np.inf).astype(np.float32)
    ground = depth < FAR
    depth[~ground] = FAR
    instances = np.where(ground, GROUND, SKY).astype(np.int16)
    normals = np.zeros_like(directions)
    normals[ground, 2] = 1.0
    for index, item in enumerate(scene.objects):
        pixels = _footprint(scene, item, size)
        hit_depth, hit_normals = _intersect(scene, item, directions[pixels])
        closer = hit_depth < depth[pixels]
        chosen = pixels[closer]
        depth[chosen] = hit_depth[closer]
        normals[chosen] = hit_normals[closer]
        instances[chosen] = index
    return depth, normals, instances, origin + depth[:, None] * directions


def _intersect(scene: Scene, item: Object, directions: np.ndarray) -> Hit:
    """Find the first hit of rays [n, 3] with one object."""
    cos, sin = np.float32(np.cos(item.angle)), np.float32(np.sin(item.angle))
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], dtype=np.float32)
    offset = np.asarray(scene.camera.position, dtype=np.float32) - np.asarray(item.centre, dtype=np.float32)
    origin = turn @ offset / np.float32(item.radius)
    with np.errstate(divide="ignore", invalid="ignore"):
        depth, normals = SOLIDS[item.shape](origin, directions @ turn.T / np.float32(item.radius))
    depth = np.where(depth > 0.05, depth, np.inf).astype(np.float32)
    return depth, (normals @ turn).astype(np.float32)


def _sphere(origin: np.ndarray, rays: np.ndarray) -> Hit:
    a, b, c = (rays * rays).sum(1), rays @ origin, origin @ origin - 1.0
    root = b * b - a * c
    depth = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
    return depth, origin + np.where(np.isfinite(depth), depth, 0)[:, None] * rays


def _cube(origin: np.ndarray, rays: np.ndarray) -> Hit:
    half = np.array([0.85, 0.85, 1.0], dtype=np.float32)
    near, far = (-half - origin) / rays, (half - origin) / rays
    entry, leave = np.minimum(near, far), np.maximum(near, far)
    axis = entry.argmax(1)
    enter = entry.max(1)
    depth = np.where(enter < leave.min(1), enter, np.inf)
    normals = np.zeros_like(rays)
    rows = np.arange(len(rays))
    normals[rows, axis] = -np.sign(rays[rows, axis])
    return depth, normals


def _cylinder(origin: np.ndarray, rays: np.ndarray) -> Hit:
    radius = 0.75
    a = rays[:, 0] ** 2 + rays[:, 1] ** 2
    b = rays[:, :2] @ origin[:2]
    root = b * b - a * (origin[0] ** 2 + origin[1] ** 2 - radius**2)
    side = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
    height = origin[2] + np.where(np.isfinite(side), side, 0) * rays[:, 2]
    side = np.where(np.abs(height) <= 1.0, side, np.inf)
    cap, cap_normals = _disc(origin, rays, 1.0, radius)
    points = origin + np.where(np.isfinite(side), side, 0)[:, None] * rays
    normals = np.stack([points[:, 0] / radius, points[:, 1] / radius, np.zeros(len(rays), rays.dtype)], axis=1)
    return _closer(side, normals, cap, cap_normals)


def _cone(origin: np.ndarray, rays: np.ndarray) -> Hit:
    # Apex at z = 1, base of radius 1 at z = -1: x^2 + y^2 = k^2 (1 - z)^2 with k = 1/2.
    k2 = 0.25
    apex = origin - np.array([0, 0, 1], dtype=np.float32)
    weights = np.array([1, 1, -k2], dtype=np.float32)
    a, b, c = (rays * rays) @ weights, rays @ (weights * apex), (apex * apex) @ weights
    root = np.sqrt(np.maximum(b * b - a * c, 0))
    valid = b * b - a * c > 0
    best = np.full(len(rays), np.inf, dtype=rays.dtype)
    for sign in (-1.0, 1.0):
        t = np.where(valid, (-b + sign * root) / a, np.inf)
        height = origin[2] + np.where(np.isfinite(t), t, 0) * rays[:, 2]
        t = np.where((np.abs(height) <= 1.0) & (t > 0), t, np.inf)
        best = np.minimum(best, t)
    points = origin + np.where(np.isfinite(best), best, 0)[:, None] * rays
    normals = np.stack([points[:, 0], points[:, 1], k2 * (1 - points[:, 2])], axis=1)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
    base, base_normals = _disc(origin, rays, -1.0, 1.0)
    return _closer(best, normals, base, base_normals)


def _disc(origin: np.ndarray, rays: np.ndarray, top: float, radius: float) -> Hit:
    """Hit the flat end at ``+top``, or at ``-top`` from below."""
    level = top if (origin[2] > top) or top < 0 else -top
    t = (level - origin[2]) / rays[:, 2]
    points = origin + np.where(np.isfinite(t), t, 0)[:, None] * rays
    inside = (points[:, 0] ** 2 + points[:, 1] ** 2 <= radius**2) & (t > 0)
    normals = np.zeros_like(rays)
    normals[:, 2] = -np.sign(rays[:, 2])
    return np.where(inside, t, np.inf), normals


def _closer(depth: np.ndarray, normals: np.ndarray, other: np.ndarray, other_normals: np.ndarray) -> Hit:
    first = depth <= other
    return np.where(first, depth, other), np.where(first[:, None], normals, other_normals)


SOLIDS: dict[str, Callable[[np.ndarray, np.ndarray], Hit]] = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
}


def _edges(instances: np.ndarray, normals: np.ndarray) -> np.ndarray:
    edges = np.zeros(instances.shape, dtype=bool)
    for first, second in (
        ((slice(1, None),), (slice(None, -1),)),
        ((slice(None), slice(1, None)), (slice(None), slice(None, -1))),
    ):
        other = instances[first] != instances[second]
        object_here = (instances[first] >= 0) | (instances[second] >= 0)
        turn = (normals[first] * normals[second]).sum(-1) < CREASE
        edges[first] |= object_here & (other | turn)
    return edges


def _shade(
    scene: Scene, depth: np.ndarray, normals: np.ndarray, instances: np.ndarray, points: np.ndarray
) -> np.ndarray:
    light = np.asarray(scene.light, dtype=np.float32)
    palette = np.array([COLOURS[o.colour] for o in scene.objects] + [scene.sky, scene.ground], dtype=np.float32)
    albedo = palette[instances]  # [S*S, 3]
    ground, solid = instances == GROUND, instances >= 0

    checks = (np.floor(points[ground, 0]) + np.floor(points[ground, 1])) % 2
    albedo[ground] *= (0.92 + 0.16 * checks)[:, None].astype(np.float32)
    diffuse = np.maximum(normals @ light, 0.0)
    lit = np.where(ground, _sunlit(scene, points, ground, light), 1.0).astype(np.float32)
    strength = scene.ambient + (1.0 - scene.ambient) * diffuse * lit
    colour = albedo * np.where(instances == SKY, 1.0, strength)[:, None]

    shiny = np.array([o.material == "shiny" for o in scene.objects] + [False, False])[instances] & solid
    if shiny.any():
        view = np.asarray(scene.camera.position, dtype=np.float32) - points[shiny]
        view /= np.linalg.norm(view, axis=1, keepdims=True)
        halfway = view + light
        halfway /= np.linalg.norm(halfway, axis=1, keepdims=True)
        colour[shiny] += (0.75 * np.maximum((normals[shiny] * halfway).sum(1), 0.0) ** 40)[:, None]

    sky = instances == SKY
    if sky.any():  # paler towards the horizon
        size = int(np.sqrt(len(instances)))
        rows = np.flatnonzero(sky) // size
        colour[sky] *= (0.85 + 0.15 * rows / size)[:, None].astype(np.float32)
    return (np.clip(colour, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _sunlit(scene: Scene, points: np.ndarray, ground: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Return 1 in the sun, less in the shadow of an object."""
    lit = np.ones(len(points), dtype=np.float32)
    floor = points[ground]
    shade = np.ones(len(floor), dtype=np.float32)
    for item in scene.objects:
        offset = np.asarray(item.centre, dtype=np.float32) - floor
        along = offset @ light
        gap = (offset * offset).sum(1) - along * along
        shade = np.where((gap < (0.85 * item.radius) ** 2) & (along > 0), np.float32(0.35), shade)
    lit[ground] = shade
    return lit
