"""SAM's image encoder: boundaries of everything, at a high resolution."""

from tove_llava.experts.base import register_expert
from tove_llava.experts.timm_expert import TimmExpert


@register_expert("sam")
class Sam(TimmExpert):
    """SAM's encoder, whose final ``norm`` is the convolutional neck (256 channels)."""

    default_source = "timm:samvit_large_patch16.sa1b"
    default_image_size = 512
    build_at_image_size = False  # positions are interpolated in each run; weights of 1024 px do not fit a smaller build
