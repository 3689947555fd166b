"""Semantic segmentation: SegFormer, Mask2Former, or the bundled tiny expert."""

from torch import Tensor

from tove_llava.experts.base import register_expert
from tove_llava.experts.dense_expert import DenseExpert


@register_expert("segmentation", "hf", "bundled")
class Segmentation(DenseExpert):
    """One probability per class and pixel."""

    default_source = "hf:facebook/mask2former-swin-large-ade-semantic"
    default_image_size = 384
    further_sources = ("hf:nvidia/segformer-b5-finetuned-ade-640-640", "bundled:segmentation")

    def to_map(self, prediction: Tensor) -> Tensor:
        return prediction.softmax(1)
