"""Depth-Anything (V1 and V2): a DINOv2 encoder under a DPT head."""

from torch import Tensor, nn
from transformers import DepthAnythingForDepthEstimation

from tove_llava.experts.dense.base import DenseArchitecture, register_dense, tokens_to_map


@register_dense("DepthAnythingForDepthEstimation")
class DepthAnything(DenseArchitecture):
    @property
    def model_class(self):
        return DepthAnythingForDepthEstimation

    def encode(self, model: nn.Module, pixels: Tensor) -> Tensor:
        # The backbone's forward would keep every block's output; only the last is needed.
        encoder = model.backbone
        tokens = encoder.layernorm(encoder.encoder(encoder.embeddings(pixels)).last_hidden_state)
        return tokens_to_map(tokens, pixels, self.config.patch_size)

    def predict(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return model(pixels).predicted_depth.unsqueeze(1)
