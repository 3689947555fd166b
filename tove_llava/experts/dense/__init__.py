"""Dense-prediction architectures from transformers, one file each, named by the class their config names."""

from tove_llava.experts.dense.base import DENSE, DenseArchitecture, register_dense

__all__ = ["DENSE", "DenseArchitecture", "register_dense"]
