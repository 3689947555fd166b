"""Average losses and gate weights between two logs."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_SCALARS = ("lm_loss", "aux_loss", "merge_loss", "steps", "samples", "gate_tokens", "gate_entropy")


class Meter:
    """Sums over steps, to which each rank adds its share.

    Args:
        columns: names of the gate's columns.
        device: of the sums; adding a tensor of this device needs no synchronisation.
    """

    def __init__(self, columns: list[str], device: torch.device) -> None:
        self.columns = columns
        self._sums = torch.zeros(len(_SCALARS) + len(columns), dtype=torch.float64, device=device)
        self._since = time.perf_counter()
        self._timed_samples = 0.0
        self._waited = 0.0

    def start_clock(self) -> None:
        """Start to measure records per second; earlier time was preparation."""
        self._since, self._timed_samples, self._waited = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure time that is spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, name: str, value: torch.Tensor | float) -> None:
        """Add this rank's share of a quantity."""
        self._sums[_SCALARS.index(name)] += value.detach() if isinstance(value, torch.Tensor) else value

    def add_samples(self, samples: float) -> None:
        self.add("samples", samples)
        self._timed_samples += samples

    def add_routing(self, routing: torch.Tensor) -> None:
        """Add gate weights ``[B,N,S]``."""
        routing = routing.detach()
        self._sums[len(_SCALARS) :] += routing.sum(dim=(0, 1))
        self.add("gate_tokens", routing.shape[0] * routing.shape[1])
        self.add("gate_entropy", torch.special.entr(routing).sum())

    def read(self, aux_coefficient: float, merge_coefficient: float = 0.0) -> dict[str, float]:
        """Return averages over all ranks and reset. Every rank calls this."""
        total = dict(zip((*_SCALARS, *self.columns), self._reduced(), strict=True))
        # Local samples over local time: the sums restart with a resumed run's clock.
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        elapsed = time.perf_counter() - self._since
        rate = self._timed_samples * world / elapsed if elapsed > 0 else 0.0
        steps = max(total["steps"], 1.0)
        loss = total["lm_loss"] + aux_coefficient * total["aux_loss"] + merge_coefficient * total["merge_loss"]
        logs = {
            "loss": loss / steps,
            "lm_loss": total["lm_loss"] / steps,
            "aux_loss": total["aux_loss"] / steps,
            "samples_per_second": rate,
            "data_wait": self._waited / elapsed if elapsed > 0 else 0.0,  # share of this rank's time
        }
        if merge_coefficient:
            logs["merge_loss"] = total["merge_loss"] / steps
        if self.columns and total["gate_tokens"] > 0:
            logs |= {f"gate/{name}": total[name] / total["gate_tokens"] for name in self.columns}
            logs["gate/entropy"] = total["gate_entropy"] / total["gate_tokens"]
        self._sums.zero_()
        self.start_clock()
        return {key: value if math.isfinite(value) else float("nan") for key, value in logs.items()}

    def state(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint. Every rank calls this."""
        return {"columns": self.columns, "sums": self._reduced()}

    def restore(self, state: dict[str, Any], rank: int) -> None:
        """Continue from :meth:`state`; only rank 0 takes the sums."""
        if state["columns"] == self.columns and rank == 0:
            self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))

    def _reduced(self) -> list[float]:
        total = self._sums.clone()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        return total.tolist()
