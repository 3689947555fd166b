"""Merge a tower into a copy of its CLIP ("ToVE-lite")."""

from tove_llava.train.merging.encoder import merged_encoder, prepare_encoder
from tove_llava.train.merging.further_images import FurtherImages, ImagePool
from tove_llava.train.merging.merge_losses import MERGE_LOSSES, TOKEN_WEIGHTS, merge_loss
from tove_llava.train.merging.merging_tower import MergingTower

__all__ = [
    "MERGE_LOSSES",
    "TOKEN_WEIGHTS",
    "FurtherImages",
    "ImagePool",
    "MergingTower",
    "merge_loss",
    "merged_encoder",
    "prepare_encoder",
]
