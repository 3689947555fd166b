"""Dense-prediction architectures from transformers, one file each, by their config's class name."""

from tove_llava.experts.dense.base import DENSE, DenseArchitecture, register_dense

__all__ = ["DENSE", "DenseArchitecture", "register_dense"]
