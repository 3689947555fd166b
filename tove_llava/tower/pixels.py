"""A tower's image processor, and the pixels of images."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import LlavaImageProcessorPil
from transformers.image_utils import is_pil_image

from tove_llava.core.errors import ConfigError
from tove_llava.tower.tower_config import ToveVisionConfig


def image_settings(vision: ToveVisionConfig, size: int | None = None) -> dict[str, Any]:
    """Return an image processor's settings: resized, middle cut out, normalised."""
    size = size or vision.image_size
    return {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def image_processor(vision: ToveVisionConfig, image_aspect_ratio: str = "square") -> LlavaImageProcessorPil:
    """Build LLaVA's image processor at the tower's size and normalisation.

    Args:
        image_aspect_ratio: ``"pad"`` pads to a square with the mean colour; ``"square"`` cuts out the middle.
    """
    return LlavaImageProcessorPil(do_pad=image_aspect_ratio == "pad", **image_settings(vision))


def pixels_of(images: Any, processor: LlavaImageProcessorPil) -> Tensor:
    """Return the pixels ``[B,3,S,S]`` of one PIL image or a list of them; ConfigError for anything else."""
    listed = [images] if is_pil_image(images) else images
    if not isinstance(listed, (list, tuple)) or not listed or not all(is_pil_image(image) for image in listed):
        raise ConfigError(
            f"the tower takes PIL images or a tensor of normalised pixels, not {_named(images)}; give a PIL image, a "
            "list of them, or tower.processor(images, return_tensors='pt')['pixel_values']"
        )
    return processor(images=list(listed), return_tensors="pt")["pixel_values"]


def check_pixels(pixel_values: Tensor, size: int) -> None:
    """Raise ConfigError for pixels that are integers or of another shape than ``[B,3,size,size]``."""
    if not pixel_values.is_floating_point():
        raise ConfigError(
            f"pixel_values are {str(pixel_values.dtype).removeprefix('torch.')}, but the tower takes normalised "
            "floating-point pixels: tower.processor(images, return_tensors='pt')['pixel_values'], or give PIL images"
        )
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
        raise ConfigError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, expected [images, 3, {size}, {size}]: "
            "the image processor and the tower's image_size disagree"
        )


def _named(images: Any) -> str:
    if isinstance(images, (list, tuple)):
        return f"a list of {type(images[0]).__name__}" if images else "an empty list"
    dtype = getattr(images, "dtype", None)
    return type(images).__name__ if dtype is None else f"{type(images).__name__} of {dtype}"
