"""Merging, "ToVE-lite": a copy of CLIP learns to give the tower's tokens, and then stands in for the whole tower."""

from tove_llava.merge.encoder import merged_encoder, prepare_encoder
from tove_llava.merge.images import FurtherImages, Pictures
from tove_llava.merge.losses import MERGE_LOSSES, TOKEN_WEIGHTS, merge_loss
from tove_llava.merge.tower import MergingTower

__all__ = [
    "MERGE_LOSSES",
    "TOKEN_WEIGHTS",
    "FurtherImages",
    "MergingTower",
    "Pictures",
    "merge_loss",
    "merged_encoder",
    "prepare_encoder",
]
