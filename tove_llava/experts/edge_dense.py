"""Edges from a dense network, such as the bundled tiny expert."""

from torch import Tensor

from tove_llava.experts.base import register_expert
from tove_llava.experts.dense_expert import DenseExpert


@register_expert("edge", "hf", "bundled")
class DenseEdge(DenseExpert):
    """An edge probability per pixel, from a dense network with one label."""

    default_source = "bundled:edge"

    def to_map(self, prediction: Tensor) -> Tensor:
        return prediction[:, :1].sigmoid()
