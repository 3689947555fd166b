"""Pictures that a question file carries inside itself."""

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
    """A picture in base64 text.

    Attributes:
        name: stands for the picture in messages and fingerprints; no other picture of the file has it.
        data: base64.
    """

    name: str
    data: str = field(repr=False, compare=False)

    def open(self) -> "Image.Image":
        """Decode the picture.

        Raises:
            DataError: it is not base64, not a picture, damaged, or too large.
        """
        from tove_llava.data.images import open_image

        try:
            content = base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"picture {self.name} is not base64 text ({error}); is the file whole?") from error
        return open_image(io.BytesIO(content), name=f"picture {self.name}")
