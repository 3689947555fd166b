"""Registered ways of bringing expert knowledge into CLIP's tokens: one file each."""

from tove_llava.tower.configuration import FUSIONS
from tove_llava.tower.fusion.base import Fusion, FusionOutput, GateInputs

__all__ = ["FUSIONS", "Fusion", "FusionOutput", "GateInputs"]
