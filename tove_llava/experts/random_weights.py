"""Random weights for smoke tests: sources that begin with ``random:``."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tove_llava.core.sources import Source


@contextmanager
def random_weights(source: Source | str) -> Iterator[None]:
    """Warn, and seed the initial values of the network that is built inside."""
    warnings.warn(f"{source}: the weights are random, for smoke tests only", UserWarning, stacklevel=3)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        yield
