"""The vision tower; its import registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel

from tove_llava.tower.balance_loss import BalanceStatistics, all_reduce_statistics, balance_loss
from tove_llava.tower.frozen import TowerFeatures
from tove_llava.tower.fusion import FUSIONS, Fusion, GateInputs
from tove_llava.tower.tower_config import ToveVisionConfig
from tove_llava.tower.tower_model import ToveVisionModel
from tove_llava.tower.tower_output import ToveVisionOutput

AutoConfig.register("tove_vision", ToveVisionConfig)
AutoModel.register(ToveVisionConfig, ToveVisionModel)
ToveVisionModel.folders = "tove_llava.checkpoints.tower_loading"

__all__ = [
    "FUSIONS",
    "BalanceStatistics",
    "Fusion",
    "GateInputs",
    "ToveVisionConfig",
    "ToveVisionModel",
    "ToveVisionOutput",
    "TowerFeatures",
    "all_reduce_statistics",
    "balance_loss",
]
