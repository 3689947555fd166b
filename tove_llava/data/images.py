"""Open images (untrusted files) and turn them into the vision tower's input."""

import io
import math
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import CLIPImageProcessorPil

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.paths import name_inside
from tove_llava.data.resize import ImageResize, pad_and_resize, pad_to_square, resize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

AspectRatio = Literal["square", "pad"]

#: an image's content: an open file, bytes, or a buffer of a data file that is read when the image is opened
ImageBytes = Any

#: images with more pixels are refused; Pillow's own limit for its warning
MAX_PIXELS = 89_478_485

# Readers of photographs. Pillow's other readers include interpreters of whole languages (EPS).
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")


_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def resolve_image(folder: str | os.PathLike[str], name: str, allow_links: bool = False) -> Path:
    """Find an image's file inside the image folder.

    Args:
        folder: the image folder; it may itself be a link.
        name: the name in the record.
        allow_links: accept links inside the folder that lead out of it.

    A name may be absolute if it is inside the folder, and have Windows' separators if no file has them in its name.

    Raises:
        DataError: the name leads out of the folder, or there is no such file.
    """
    name = name_inside(folder, name, allow_links)
    path = os.path.join(folder, name)
    try:
        mode = os.stat(path).st_mode
    except OSError:
        raise DataError(f"there is no image {name!r} in the image folder {folder}{_similar(path)}") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"image {name!r} in {folder} is not a file")
    return Path(path)


def _similar(path: str) -> str:
    """Name the files that differ from a missing one only in their extension."""
    stem, own = os.path.splitext(path)
    endings = (each for ending in _EXTENSIONS for each in (ending, ending.upper()) if each != own)
    found = [os.path.basename(stem) + ending for ending in endings if os.path.isfile(stem + ending)]
    return f"; there is {found[0]!r}, so correct the record or the file's name" if found else ""


def open_image(file: str | Path | ImageBytes, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Decode an image file, or an animation's first frame, keeping its mode.

    Args:
        file: its path, or its content.
        name: its name in messages; the path by default.

    Raises:
        DataError: not an image, damaged, or too large to be decoded safely.
    """
    with _opened(file, max_pixels, name) as image:
        image.load()
        return image.copy() if getattr(image, "is_animated", False) else image


def count_pixels(file: str | Path | ImageBytes, max_pixels: int = MAX_PIXELS, name: str | None = None) -> int:
    """Read an image's size without decoding it; arguments and errors as in :func:`open_image`."""
    with _opened(file, max_pixels, name) as image:
        return image.width * image.height


@contextmanager
def _opened(file: str | Path | ImageBytes, max_pixels: int, name: str | None) -> Iterator[Image.Image]:
    name = str(file) if name is None else name
    if not isinstance(file, (str, Path)) and not hasattr(file, "read"):
        file = io.BytesIO(file)
    try:
        with Image.open(file, formats=_available_formats()) as image:
            if image.width * image.height > max_pixels:
                raise DataError(
                    f"{name} has {image.width} x {image.height} pixels, more than the limit of {max_pixels}; "
                    "shrink it, or raise max_pixels"
                )
            yield image
    except FileNotFoundError:
        raise DataError(f"there is no image file {name}") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not an image that can be read (JPEG, PNG, WebP, GIF, BMP, TIFF)") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} is too large to be decoded safely: {error}") from error
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, IndexError, struct.error) as error:
        # Pillow reports damage by any of these.
        raise DataError(f"{name} is damaged ({error}); replace the file or take the record out") from error


@lru_cache(maxsize=1)
def _available_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def to_rgb(
    image: Image.Image, exif_transpose: bool = False, background: tuple[int, int, int] | None = None
) -> Image.Image:
    """Convert an image to 8-bit RGB.

    Pillow clips 16-bit greyscale at 255; here it is scaled.

    Args:
        image: in any mode.
        exif_transpose: turn the image as its EXIF orientation says. LLaVA does not.
        background: colour put behind transparent parts. None drops the transparency, as LLaVA does, and shows the
            colour that the file has under it.

    Raises:
        DataError: a floating-point or 32-bit image, whose range is unknown.
    """
    if exif_transpose:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise DataError(
                f"a 32-bit image with values from {values.min()} to {values.max()}; convert it to 8 or 16 bits"
            )
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError("a floating-point image, whose range is unknown; convert it to 8 or 16 bits")
    if background is not None and image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def naming(name: str | Path | ImageBytes) -> Iterator[None]:
    """Put an image's name before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def check_shape(image: Image.Image, side: int, aspect_ratio: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raise DataError for an image that is too long and thin for a square of ``side`` pixels."""
    long, short = max(image.size), min(image.size)
    if short == 0:
        raise DataError("an empty image")
    work = long * long if aspect_ratio == "pad" else side * math.ceil(long / short * side)
    if work > 2 * max_pixels:
        raise DataError(
            f"{image.width} x {image.height} pixels: too long and thin to be brought to a square; crop or shrink it"
        )


class ImageTransform:
    """Turns an image into the tower's ``pixel_values``, exactly as LLaVA-1.5 does.

    ``square`` resizes the shortest side and cuts out the middle; ``pad`` first pads to a square with the mean colour.
    Resizing is Pillow's 8-bit bicubic. Every pixel equals that of transformers' slower CLIP processor for Pillow.

    Args:
        image_size: pixels per side of the result.
        aspect_ratio: ``"square"`` or ``"pad"``.
        mean, std: normalisation per channel.
        exif_transpose, background: see :func:`to_rgb`.
        max_pixels: limit on the decoded, padded and resized image.
        image_resize: ``"pillow"``, or a faster way with a stated tolerance: see :mod:`tove_llava.data.resize`.

    Raises:
        ConfigError: an unknown aspect ratio, or way of resizing.
    """

    def __init__(
        self,
        image_size: int,
        aspect_ratio: AspectRatio = "square",
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        exif_transpose: bool = False,
        background: tuple[int, int, int] | None = None,
        max_pixels: int = MAX_PIXELS,
        image_resize: ImageResize = "pillow",
    ) -> None:
        for key, value, known in (
            ("image_aspect_ratio", aspect_ratio, get_args(AspectRatio)),
            ("image_resize", image_resize, get_args(ImageResize)),
        ):
            if value not in known:
                raise ConfigError(f"unknown {key} {value!r}; choose one of {', '.join(known)}")
        self.image_size = image_size
        self.aspect_ratio = aspect_ratio
        self.exif_transpose = exif_transpose
        self.background = background
        self.max_pixels = max_pixels
        self.image_resize = image_resize
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=list(mean),
            image_std=list(std),
            do_convert_rgb=False,
        )
        red, green, blue = (int(value * 255) for value in mean)
        self._pad_colour = (red, green, blue)
        # The processor's value for each level and channel: a table gives the same values as its arithmetic.
        levels = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)  # [256,1,3]
        shown = self.processor(Image.fromarray(levels), do_resize=False, do_center_crop=False, return_tensors="np")
        self._values: np.ndarray[Any, Any] = shown["pixel_values"][0, :, :, 0].astype(np.float32)  # [3,256]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transform one image to float32 [3, image_size, image_size].

        Raises:
            DataError: the image is too long and thin to be padded or resized safely, or of an unknown range.
        """
        image, side = self._checked_rgb(image), self.image_size
        if self.aspect_ratio == "pad":
            levels = np.asarray(pad_and_resize(image, side, self._pad_colour, self.image_resize))  # uint8 [S,S,3]
        else:
            longer = int(side * max(image.size) / min(image.size))
            width, height = (side, longer) if image.width <= image.height else (longer, side)
            left, top = (width - side) // 2, (height - side) // 2  # as the processor crops
            resized = np.asarray(resize(image, width, height, self.image_resize))
            levels = resized[top : top + side, left : left + side]
        pixels = np.empty((3, side, side), dtype=np.float32)
        for channel in range(3):  # without a mode NumPy would make a copy
            np.take(self._values[channel], levels[..., channel], out=pixels[channel], mode="clip")
        return torch.from_numpy(pixels)

    def framed(self, image: Image.Image) -> Image.Image:
        """Return the tower's RGB square in original resolution; errors as when called."""
        image = self._checked_rgb(image)
        image = pad_to_square(image, self._pad_colour) if self.aspect_ratio == "pad" else image
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    def open(self, file: str | Path | ImageBytes, name: str | None = None) -> torch.Tensor:
        """Transform an image file, or its content; every :class:`DataError` has its name."""
        image = open_image(file, self.max_pixels, name)
        with naming(file if name is None else name):
            return self(image)

    def _checked_rgb(self, image: Image.Image) -> Image.Image:
        check_shape(image, self.image_size, self.aspect_ratio, self.max_pixels)
        return to_rgb(image, self.exif_transpose, self.background)
