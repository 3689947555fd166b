"""Monocular depth: DPT, Depth-Anything, or the bundled tiny expert."""

from typing import ClassVar

import torch
from torch import Tensor

from tove_llava.experts.base import register_expert
from tove_llava.experts.dense_expert import DenseExpert


@register_expert("depth", "hf", "bundled")
class Depth(DenseExpert):
    """Inverse depth, scaled to 0..1 within each image.

    Options:
        relative: false keeps the scale of a metric model (most models know none); predictions must be of order 1.
    """

    option_names: ClassVar[tuple[str, ...]] = (*DenseExpert.option_names, "relative")
    map_options: ClassVar[tuple[str, ...]] = (*DenseExpert.map_options, "relative")
    default_source = "hf:depth-anything/Depth-Anything-V2-Small-hf"
    default_image_size = 336
    further_sources = ("hf:Intel/dpt-large", "bundled:depth")

    def to_map(self, prediction: Tensor) -> Tensor:
        if not self.option("relative", True):
            return prediction
        low, high = prediction.amin((1, 2, 3), keepdim=True), prediction.amax((1, 2, 3), keepdim=True)
        return (prediction - low) / (high - low).clamp_min(torch.finfo(prediction.dtype).tiny)
