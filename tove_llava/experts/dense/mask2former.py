"""Mask2Former: class probabilities from its queries, or tokens of its hierarchical encoder."""

from torch import Tensor, nn
from transformers import Mask2FormerForUniversalSegmentation

from tove_llava.experts.dense.base import DenseArchitecture, register_dense


@register_dense("Mask2FormerForUniversalSegmentation")
class Mask2Former(DenseArchitecture):
    """Features are the encoder's last stage, a thirty-second of the input."""

    @property
    def model_class(self):
        return Mask2FormerForUniversalSegmentation

    def encode(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return model.model.pixel_level_module.encoder(pixels).feature_maps[-1]

    def predict(self, model: nn.Module, pixels: Tensor) -> Tensor:
        out = model(pixels)
        classes = out.class_queries_logits.float().softmax(-1)[..., :-1]  # [B,Q,C], "no object" left out
        masks = out.masks_queries_logits.float().sigmoid()  # [B,Q,h,w]
        scores = (classes.transpose(1, 2) @ masks.flatten(2)).unflatten(2, masks.shape[-2:])  # [B,C,h,w]
        return scores.clamp_min(1e-6).log()  # logits, like other architectures': softmax makes them a mixture
