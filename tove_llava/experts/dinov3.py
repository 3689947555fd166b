"""DINOv3: self-supervised features; its weights carry Meta's own licence."""

from tove_llava.experts.base import register_expert
from tove_llava.experts.timm_expert import TimmExpert


@register_expert("dinov3")
class DinoV3(TimmExpert):
    default_source = "timm:vit_large_patch16_dinov3.lvd1689m"
    default_image_size = 384  # 24 x 24 tokens
