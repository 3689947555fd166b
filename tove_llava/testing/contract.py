"""A contract: rules in words, each with the code that checks it."""

import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from tove_llava.core.errors import ToveError
from tove_llava.core.plugins import defining_file, fault

T = TypeVar("T")


class ContractError(ToveError, AssertionError):
    """A part breaks rules of its contract; the message lists them."""


class Skip(Exception):
    """Raised by a rule that says nothing about this part."""


class Contract(Generic[T]):
    """The rules for one kind of part, in the order in which they are checked."""

    def __init__(self) -> None:
        self._rules: list[tuple[str, Callable[[T], None]]] = []

    def rule(self, text: str) -> Callable[[Callable[[T], None]], Callable[[T], None]]:
        """Add a rule; the function raises when a part breaks it."""

        def add(function: Callable[[T], None]) -> Callable[[T], None]:
            self._rules.append((text, function))
            return function

        return add

    def check(self, make: Callable[[], T], name: str, component: Any) -> list[str]:
        """Check every rule, each on a fresh subject with the same random numbers.

        Args:
            make: makes what the rules look at.
            name: the part's, for messages.
            component: the part; a fault is located in the file that defines it.

        Returns:
            the rules that hold. A rule that says nothing about this part is left out.

        Raises:
            ContractError: rules are broken.
        """
        held, broken = [], []
        for text, function in self._rules:
            try:
                with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.manual_seed(0)
                    function(make())
            except Skip:
                continue
            except Exception as error:
                broken.append(f"  * {text}\n      {defining_file(component)}{fault(error, defining_file(component))}")
            else:
                held.append(text)
        if broken:
            count = f"{len(broken)} of {len(held) + len(broken)} rules"
            raise ContractError("\n".join([f"{name} breaks {count} of its contract:", *broken]))
        return held


def require(condition: bool, message: str) -> None:
    """Raise AssertionError with a message; unlike assert also under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def require_close(found: torch.Tensor, expected: torch.Tensor, message: str, tolerance: float = 1e-4) -> None:
    """Raise AssertionError if two tensors differ."""
    require(found.shape == expected.shape, f"{message}: shapes {tuple(found.shape)} and {tuple(expected.shape)}")
    difference = (found.float() - expected.float()).abs().max().item() if found.numel() else 0.0
    limit = tolerance * max(1.0, expected.float().abs().max().item() if expected.numel() else 0.0)
    require(difference <= limit, f"{message}: they differ by up to {difference:.3g}")
