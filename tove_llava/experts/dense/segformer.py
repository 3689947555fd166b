"""SegFormer, whose architecture the bundled tiny experts share."""

import copy

from torch import Tensor, nn
from transformers import SegformerForSemanticSegmentation, SegformerModel

from tove_llava.core.errors import ConfigError
from tove_llava.experts.base import choose
from tove_llava.experts.dense.base import DenseArchitecture, register_dense

_PER_STAGE = ("depths", "sr_ratios", "hidden_sizes", "patch_sizes", "strides", "num_attention_heads", "mlp_ratios")


@register_dense("SegformerForSemanticSegmentation", "SegformerModel")
class Segformer(DenseArchitecture):
    """SegFormer; option ``stage`` is the encoder stage of the features (-1: last)."""

    option_names = ("stage",)

    def __init__(self, config, options, whole) -> None:
        super().__init__(config, options, whole)
        if whole and "stage" in options:
            raise ConfigError("option 'stage' belongs to mode 'features'; mode 'map' uses every encoder stage")
        stages = choose(options.get("stage", -1), config.num_encoder_blocks, "option stage") + 1
        if not whole and stages < config.num_encoder_blocks:
            self.config = copy.deepcopy(config)
            self.config.num_encoder_blocks = stages
            for key in _PER_STAGE:
                setattr(self.config, key, list(getattr(config, key))[:stages])

    @property
    def model_class(self):
        return SegformerForSemanticSegmentation if self.whole else SegformerModel

    def encode(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return model(pixels).last_hidden_state

    def predict(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return model(pixels).logits
