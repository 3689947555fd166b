"""Images that a question file holds as text."""

import base64
import binascii
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tove_llava.core.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class EmbeddedImage:
    """An image in base64 text; ``name`` identifies it in messages and fingerprints."""

    name: str
    data: str = field(repr=False, compare=False)

    def open(self) -> "Image.Image":
        """Decode the image.

        Raises:
            DataError: it is not base64, not an image, damaged, or too large.
        """
        from tove_llava.data.images import open_image

        try:
            content = base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"image {self.name} is not base64 text ({error}); is the file whole?") from error
        return open_image(io.BytesIO(content), name=f"image {self.name}")
