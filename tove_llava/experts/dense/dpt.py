"""DPT with a plain ViT encoder (DPT-Large), for any dense map."""

from torch import Tensor, nn
from transformers import DPTForDepthEstimation, DPTForSemanticSegmentation, DPTModel

from tove_llava.core.errors import ConfigError
from tove_llava.experts.dense.base import DenseArchitecture, register_dense, tokens_to_map


@register_dense("DPTModel")
class DPT(DenseArchitecture):
    """The encoder without a head, as a self-contained checkpoint stores it."""

    model_kwargs = {"add_pooling_layer": False}
    head_class = None

    def __init__(self, config, options, whole) -> None:
        super().__init__(config, options, whole)
        if config.is_hybrid or config.backbone_config is not None:
            raise ConfigError("DPT is read with its own ViT encoder only, not with another backbone (backbone_config)")
        if whole and self.head_class is None:
            raise ConfigError("this checkpoint only holds DPT's encoder, which has no map; use mode 'features'")
        if whole:
            self.model_kwargs = {}

    @property
    def model_class(self):
        return self.head_class if self.whole else DPTModel

    def encode(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return tokens_to_map(model(pixels).last_hidden_state, pixels, self.config.patch_size)

    def predict(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return model(pixels).logits


@register_dense("DPTForSemanticSegmentation")
class DPTMap(DPT):
    head_class = DPTForSemanticSegmentation


@register_dense("DPTForDepthEstimation")
class DPTDepth(DPT):
    head_class = DPTForDepthEstimation

    def predict(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return model(pixels).predicted_depth.unsqueeze(1)
