"""Routing maps: the expert that each token of an image listens to.

``g * g = N`` vision tokens, ``S`` gate columns: the experts, and a null slot (called "none") where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tove_llava.core.errors import ConfigError
from tove_llava.core.text import aligned
from tove_llava.inference.routing_map import RoutingMap, routing_map
from tove_llava.tower import ToveVisionConfig, ToveVisionModel


def seen_image(pixels: torch.Tensor, config: ToveVisionConfig) -> Image.Image:
    """Turn ``[3,S,S]`` CLIP-normalised pixels into the RGB image that the model sees."""
    mean = torch.tensor(config.image_mean).view(3, 1, 1)
    std = torch.tensor(config.image_std).view(3, 1, 1)
    values = (pixels.float().cpu() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def save_routing(found: RoutingMap, image: Image.Image, folder: str | Path, name: str) -> list[Path]:
    """Write ``NAME_argmax.png``, ``NAME_weight_COLUMN.png`` by used column, and ``NAME.npz``.

    The archive holds ``routing`` (float32 ``[g,g,S]``) and ``names`` (S strings).

    Raises:
        ConfigError: matplotlib is not installed.
    """
    from tove_llava.analysis.plots import plot_routing_argmax, plot_routing_weight

    folder = Path(folder)
    weights = found.weights.numpy()
    files = [folder / f"{name}_argmax.png"]
    plot_routing_argmax(image, found.argmax.numpy(), found.chosen, files[0])
    for column, title in enumerate(found.names):
        if weights[..., column].any():  # a detached expert has no map
            files.append(folder / f"{name}_weight_{title}.png")
            plot_routing_weight(image, weights[..., column], title, float(weights.max()), files[-1])
    files.append(folder / f"{name}.npz")
    np.savez(files[-1], routing=weights, names=np.array(found.names))
    return files


def show_routing(
    answerer: Any, images: Sequence[str | Path], folder: str | Path
) -> list[tuple[Path, RoutingMap, list[Path]]]:
    """Draw the routing of images; return images, routings and files.

    Images are turned upright by their EXIF orientation, as in a chat. Files have the image's name; where two images
    have one name, the number in ``images`` is added.

    Args:
        answerer: a loaded :class:`~tove_llava.inference.generation.Answerer`.

    Raises:
        ConfigError: the model has no gate, or all its experts are detached. DataError: an image cannot be read.
    """
    tower = answerer.tower
    if not isinstance(tower, ToveVisionModel) or not tower.active_experts:
        raise ConfigError("this model has no experts to route to: its vision tower is plain CLIP")
    pixels = [answerer.pixels(image, upright=True) for image in images]  # reads every image before the first is drawn
    stems = [Path(image).stem for image in images]
    shown = []
    for number, (image, values) in enumerate(zip(images, pixels, strict=True), start=1):
        found = routing_map(tower, values)
        if found is None:
            raise ConfigError(f"fusion {tower.config.fusion!r} has no gate, so there is no routing to show")
        name = stems[number - 1]
        name = name if stems.count(name) == 1 else f"{name}_{number}"
        files = save_routing(found, seen_image(values, tower.config), folder, name)
        shown.append((Path(image), found, files))
    return shown


def routing_table(shown: Sequence[tuple[Path, RoutingMap, list[Path]]]) -> str:
    """Format mean gate weights and, in brackets, the shares of tokens."""
    lines = [["image", *shown[0][1].names]]
    for image, found, _ in shown:
        cells = [f"{found.means[name]:.3f} ({100 * found.chosen[name]:.0f}%)" for name in found.names]
        lines.append([image.name, *cells])
    return aligned(lines)
