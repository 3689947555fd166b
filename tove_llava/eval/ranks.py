"""Several processes that answer one benchmark together, as ``torchrun`` starts them."""

import os
from datetime import timedelta
from functools import lru_cache
from typing import Any

from torch import distributed


class Ranks:
    """This process among its fellows; alone without ``torchrun``.

    Args:
        store: torch.distributed's, which all processes reach; None for a process alone.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None) -> None:
        self.rank = rank
        self.world = world
        self._store = store
        self._counts: dict[str, int] = {}
        self._runs = 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """The processes that ``torchrun`` started; joins them."""
        return _joined() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else cls()

    def wait(self) -> None:
        """Return once every process has come here; fails when one of them has died."""
        if self.world > 1:
            distributed.barrier()

    def begin(self) -> str:
        """A name for the next piece of work, the same on all processes, for its counters."""
        self._runs += 1
        return f"run{self._runs}"

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter that all processes share, from 0 on; the new value."""
        if self._store is not None:
            return int(self._store.add(f"tove_llava/{counter}", amount))
        self._counts[counter] = self._counts.get(counter, 0) + amount
        return self._counts[counter]


@lru_cache(maxsize=1)
def _joined() -> Ranks:
    store, rank, world = next(distributed.rendezvous("env://"))
    # For waits only: no tensor is exchanged. A slow process may be hours behind a fast one.
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(days=1))
    return Ranks(rank, world, store)
