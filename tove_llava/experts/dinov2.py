"""DINOv2: self-supervised features with strong local geometry."""

from tove_llava.experts.base import register_expert
from tove_llava.experts.timm_expert import TimmExpert


@register_expert("dinov2")
class DinoV2(TimmExpert):
    default_source = "timm:vit_large_patch14_dinov2.lvd142m"
    default_image_size = 336  # 24 x 24 tokens, like CLIP-L/14 at 336; the weights' own size is 518
