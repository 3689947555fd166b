"""Registries: each component registers itself in the file that defines it."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar, cast

from tove_llava.core.errors import ConfigError

T = TypeVar("T")
C = TypeVar("C", bound=type)


def closest(name: str, known: Iterable[str]) -> str:
    """Write " Did you mean ...?" where a known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class Registry(Generic[T]):
    """A map of exact names to components of one kind.

    Args:
        kind: the kind in the singular ("expert"), for error messages.
        package: dotted name of the package whose modules register components. The first look-up imports all its
            modules, so a new component is one new file.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that stores a component under ``name``.

        Raises:
            ConfigError: another component already has that name.
        """

        def add(component: T) -> T:
            if name in self._entries:
                both = f"{self._entries[name]!r} and {component!r}"
                raise ConfigError(f"{self.kind} {name!r} is registered twice: {both}")
            self._entries[name] = component
            return component

        return add

    def register_class(self, name: str) -> Callable[[C], C]:
        """Return a decorator that registers a class and sets its ``name``."""

        def add(cls: C) -> C:
            cls.name = name  # type: ignore[attr-defined]
            return cast(C, self.register(name)(cast(T, cls)))

        return add

    def get(self, name: str) -> T:
        """Return the component called exactly ``name``.

        Raises:
            ConfigError: no component has that name; the message lists the existing names.
        """
        self._discover()
        if name not in self._entries:
            hint = closest(name, self._entries)
            raise ConfigError(f"unknown {self.kind} {name!r}.{hint} Available: {', '.join(sorted(self._entries))}")
        return self._entries[name]

    def names(self) -> list[str]:
        """List all registered names, sorted."""
        self._discover()
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _discover(self) -> None:
        if self._package is None:
            return
        package, self._package = self._package, None  # cleared first: a module may look up the registry while loading
        root = importlib.import_module(package)
        for module in pkgutil.iter_modules(root.__path__):
            importlib.import_module(f"{package}.{module.name}")
