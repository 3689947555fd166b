"""EVA-02: contrastive image-text features, from timm or from open_clip."""

from tove_llava.experts.base import register_expert
from tove_llava.experts.timm_expert import TimmExpert


@register_expert("eva")
class Eva(TimmExpert):
    default_source = "timm:eva02_large_patch14_clip_336.merged2b"
    default_image_size = 336
