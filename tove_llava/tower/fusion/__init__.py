"""Registered fusions of experts and CLIP's tokens, one file each."""

from tove_llava.tower.fusion.base import Fusion, FusionOutput, GateInputs, register_fusion
from tove_llava.tower.tower_config import FUSIONS

__all__ = ["FUSIONS", "Fusion", "FusionOutput", "GateInputs", "register_fusion"]
