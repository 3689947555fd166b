"""Ways of resizing an 8-bit RGB picture, by the name that ``image_resize`` has in a stage.

- ``pillow``: Pillow's bicubic, LLaVA's own: every level is the original's.
- ``torch``: torch's bicubic over the same support, vectorised, and several times as fast. Its weights have 16 bits
  instead of 22: of a photograph 0.4 % of the levels differ, by one of 255; :data:`TOLERANCE` bounds it.
"""

from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

ImageResize = Literal["pillow", "torch"]
Levels: TypeAlias = NDArray[np.uint8]
Colour: TypeAlias = tuple[int, int, int]

#: by how many of 255 levels a value may differ from Pillow's
TOLERANCE: dict[ImageResize, int] = {"pillow": 0, "torch": 2}


class _Library(Protocol):
    """What is needed of a library; ``picture`` is in a form of its own."""

    def read(self, image: Image.Image) -> Any: ...

    def resize(self, picture: Any, width: int, height: int) -> Any: ...

    def between_rows(self, picture: Any, height: int, colour: Colour) -> Any:
        """Above and below rows of a colour, as many as make up the height."""

    def levels(self, picture: Any) -> Levels: ...


class _Pillow:
    def read(self, image: Image.Image) -> Image.Image:
        return image

    def resize(self, picture: Image.Image, width: int, height: int) -> Image.Image:
        return picture.resize((width, height), Image.Resampling.BICUBIC)

    def between_rows(self, picture: Image.Image, height: int, colour: Colour) -> Image.Image:
        whole = Image.new("RGB", (picture.width, height), colour)
        whole.paste(picture, (0, (height - picture.height) // 2))
        return whole

    def levels(self, picture: Image.Image) -> Levels:
        return np.asarray(picture)


class _Torch:
    """Pictures are uint8 ``[1,h,w,3]``: their channels lie side by side, which torch's kernel wants."""

    def read(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image))[None]

    def resize(self, picture: torch.Tensor, width: int, height: int) -> torch.Tensor:
        channels_last = picture.permute(0, 3, 1, 2)  # [1,3,h,w]
        resized = interpolate(channels_last, (height, width), mode="bicubic", align_corners=False, antialias=True)
        return resized.permute(0, 2, 3, 1)

    def between_rows(self, picture: torch.Tensor, height: int, colour: Colour) -> torch.Tensor:
        _, rows, width, _ = picture.shape
        above = (height - rows) // 2
        row = torch.tensor(colour, dtype=torch.uint8).expand(1, height - rows, width, 3)
        return torch.cat([row[:, :above], picture, row[:, above:]], dim=1)

    def levels(self, picture: torch.Tensor) -> Levels:
        return picture[0].numpy()


_LIBRARIES: dict[ImageResize, _Library] = {"pillow": _Pillow(), "torch": _Torch()}


def resize(image: Image.Image, width: int, height: int, how: ImageResize = "pillow") -> Levels:
    """Levels ``[height, width, 3]`` of an RGB picture at another size."""
    library = _LIBRARIES[how]
    picture = library.read(image)
    return library.levels(picture if image.size == (width, height) else library.resize(picture, width, height))


def pad_and_resize(image: Image.Image, side: int, colour: Colour, how: ImageResize = "pillow") -> Levels:
    """What padding to a square with ``colour`` and then resizing to ``[side, side, 3]`` gives, level by level.

    Pictures are resized along their rows first and then along their columns. A row of one colour keeps it, so the rows
    above and below a wide picture are put there between the two passes, when they are shorter.
    """
    width, height = image.size
    if width <= height:
        return resize(pad_to_square(image, colour), side, side, how)
    library = _LIBRARIES[how]
    picture = library.read(image)
    narrow = picture if width == side else library.resize(picture, side, height)
    square = library.between_rows(narrow, width, colour)
    return library.levels(square if width == side else library.resize(square, side, side))


def pad_to_square(image: Image.Image, colour: Colour) -> Image.Image:
    """Put a picture in the middle of a square of the given colour."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
