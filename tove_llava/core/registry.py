"""Registries: each component registers itself in the file that defines it."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar, cast

from tove_llava.core.errors import ConfigError
from tove_llava.core.plugins import FLAG, defining_file, fault, load_plugins, report

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
            modules, so a new component is one new file. A module that fails is reported, and the others still load.

    A registry with a package loads the user's plugins too (:mod:`tove_llava.core.plugins`).
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package, self._imported = package, False
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that stores a component under ``name``.

        A definition that is run again, as a notebook's cell is, replaces its older self.

        Raises:
            ConfigError: another component already has that name.
        """

        def add(component: T) -> T:
            self.complete_before(component)
            if name in self._entries and _definition(self._entries[name]) != _definition(component):
                both = f"in {defining_file(self._entries[name])} and in {defining_file(component)}"
                raise ConfigError(f"{self.kind} {name!r} is registered twice, {both}; rename one of them")
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
            raise ConfigError(
                f"unknown {self.kind} {name!r}.{hint} Available: {', '.join(sorted(self._entries))}. "
                f"One of your own comes with {FLAG} FILE.py"
            )
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

    def complete_before(self, component: object) -> None:
        """Import the package's own modules before a component from elsewhere takes a name.

        So a plugin cannot take the place of a part of the package, whichever of them is loaded first.
        """
        module = getattr(component, "__module__", None) or type(component).__module__
        if self._package is not None and not module.startswith(self._package.partition(".")[0] + "."):
            self._import_package()

    def _discover(self) -> None:
        if self._package is not None:
            self._import_package()
            load_plugins()

    def _import_package(self) -> None:
        if self._package is None or self._imported:
            return
        self._imported = True  # set first: a module may look up the registry while it loads
        root = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(root.__path__):
            try:
                importlib.import_module(f"{self._package}.{module.name}")
            except Exception as error:
                file = f"{root.__path__[0]}/{module.name}.py"
                report(file + fault(error, file))


def _definition(component: object) -> tuple[str, str]:
    cls = component if hasattr(component, "__qualname__") else type(component)
    return cls.__module__, cls.__qualname__  # type: ignore[attr-defined]
