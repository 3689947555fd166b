"""SigLIP 2: image-text features trained with a sigmoid loss and dense objectives."""

from tove_llava.experts.base import register_expert
from tove_llava.experts.timm_expert import TimmExpert


@register_expert("siglip2")
class SigLip2(TimmExpert):
    default_source = "timm:vit_large_patch16_siglip_384.v2_webli"
    default_image_size = 384  # 24 x 24 tokens
