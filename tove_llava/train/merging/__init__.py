"""Merging, "ToVE-lite": a copy of CLIP learns to give the tower's tokens, and then stands in for the whole tower."""

from tove_llava.train.merging.encoder import merged_encoder, prepare_encoder
from tove_llava.train.merging.further_images import FurtherImages, Pictures
from tove_llava.train.merging.merge_losses import MERGE_LOSSES, TOKEN_WEIGHTS, merge_loss
from tove_llava.train.merging.merging_tower import MergingTower

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
