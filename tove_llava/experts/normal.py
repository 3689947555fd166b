"""Surface normals: a user's DPT or SegFormer, or the bundled tiny expert."""

import torch.nn.functional as F
from torch import Tensor

from tove_llava.core.errors import ConfigError
from tove_llava.experts.base import register_expert
from tove_llava.experts.dense_expert import DenseExpert


@register_expert("normal", "hf", "bundled")
class Normal(DenseExpert):
    """A unit vector per pixel."""

    default_source = "bundled:normal"
    remark = "no public transformers checkpoint predicts normals; name a folder of your own: hf:/path/to/folder"

    def to_map(self, prediction: Tensor) -> Tensor:
        if prediction.shape[1] != 3:
            raise ConfigError(f"expert {self.name!r}: {self.source} gives {prediction.shape[1]} channels, not x, y, z")
        return F.normalize(prediction, dim=1)
