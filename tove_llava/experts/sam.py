"""SAM's image encoder: boundaries of everything, at a high resolution."""

from tove_llava.experts.base import register_expert
from tove_llava.experts.timm_expert import TimmExpert


@register_expert("sam")
class Sam(TimmExpert):
    """``norm`` applies SAM's convolutional neck (256 channels), by default after the last block."""

    default_source = "timm:samvit_large_patch16.sa1b"
    default_image_size = 512
    build_at_image_size = False  # positions are interpolated on the fly; weights of 1024 px do not fit a smaller build
