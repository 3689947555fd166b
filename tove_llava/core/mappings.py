"""Merge, override and check the mappings of presets and other YAML files."""

import dataclasses
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from tove_llava.core.errors import ConfigError
from tove_llava.core.registry import closest

T = TypeVar("T")
_SCALARS = (bool, int, float, str)
_LARGEST = sys.float_info.max


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; ConfigError, which begins with ``where``, if it is none."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        reason: Any = "nested too deeply"
    except (yaml.YAMLError, ValueError) as error:  # the latter: a date or a number that cannot be
        reason = error
    raise ConfigError(f"{where}: not valid YAML: {reason}")


def from_mapping(cls: type[T], value: Any, where: str, **given: Any) -> T:
    """Build a dataclass, and the dataclasses within it, from a mapping.

    Args:
        where: the file or entry that the mapping is from, for messages.
        given: fields that do not come from the mapping.

    Raises:
        ConfigError: a key is unknown or missing (the known keys are listed), or a value has another type.
    """
    return _build(cls, value, f"{where}: ", "", given)


def check_types(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for a value that is not of the type that its class annotates.

    Args:
        values: by field; those of the class's parents are not checked.
    """
    for key, kind in inspect.get_annotations(cls, eval_str=True).items():
        if key in values:
            _convert(kind, values[key], f"{where}: ", key)


def _build(cls: Any, value: Any, where: str, path: str, given: Mapping[str, Any]) -> Any:
    head, prefix = (f"{where}{path}: ", f"{path}.") if path else (where, "")
    if not isinstance(value, Mapping):
        raise ConfigError(f"{head}expected a mapping of keys, got {value!r}")
    known = {field.name: field for field in dataclasses.fields(cls) if field.name not in given}
    listed = f"Known: {', '.join(known)}"
    for key in value:
        if key not in known:
            raise ConfigError(f"{head}unknown key {key!r}.{closest(str(key), known)} {listed}")
    for key, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in value:
            raise ConfigError(f"{head}needs a {key!r}. {listed}")
    kinds = get_type_hints(cls)
    return cls(**given, **{key: _convert(kinds[key], entry, where, prefix + key) for key, entry in value.items()})


def _convert(kind: Any, value: Any, where: str, path: str) -> Any:
    """Return a value as its field's annotation wants it."""
    outer, inner = get_origin(kind), get_args(kind)
    if outer in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        kind = next(member for member in inner if member is not type(None))
        outer, inner = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where, path, {})
    if outer in (list, tuple):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where}{path}: expected a list, got {value!r}")
        return outer(_convert(inner[0], entry, where, f"{path}[{index}]") for index, entry in enumerate(value))
    if outer in (dict, Mapping):
        if value is None:  # what YAML makes of a key that nothing follows
            return {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}{path}: expected a mapping of keys, got {value!r}")
        return {key: _convert(inner[1], entry, where, f"{path}.{key}") for key, entry in value.items()}
    if kind in _SCALARS:
        _check_scalar(kind, value, f"{where}{path}")
    return value


def _check_scalar(kind: type, value: Any, where: str) -> None:
    accepted = isinstance(value, int | float if kind is float else kind)
    if kind in (int, float) and accepted and not abs(value) <= _LARGEST:
        raise ConfigError(f"{where}: expected a finite number, got {value!r:.80}")
    if accepted and (kind is bool or not isinstance(value, bool)):
        return
    hint = " (YAML wants a dot in 1.0e-3)" if kind is float else ""  # without one it reads a string
    raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}{hint}")


def merged(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings within mappings; other values are replaced."""
    found = dict(base)
    for key, value in update.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return found


def override_key(data: dict[str, Any], override: str) -> None:
    """Set a key by ``key.path=value``, in place.

    An entry of a list is addressed by its name; a list of names keeps the entries of these names.

    Raises:
        ConfigError: the text has another form, or no entry has that name.
    """
    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} is not of the form key.path=value, such as vision.top_k=2")
    *parents, last = path.strip().split(".")
    node: Any = data
    for key in parents:
        if isinstance(node, list):
            node = _named(node, key, override)
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}  # an unknown key is reported, with near matches, when the mapping is checked
            node = node[key]
    if not isinstance(node, dict):
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} is not a mapping")
    value = parse_yaml(text, f"override {override!r}")
    old = node.get(last)
    if isinstance(old, list) and isinstance(value, list) and any(isinstance(entry, dict) for entry in old):
        value = [_named(old, entry, override) if isinstance(entry, str) else entry for entry in value]
    node[last] = value


def _named(entries: Sequence[Any], name: str, override: str) -> Any:
    named = {entry["name"]: entry for entry in entries if isinstance(entry, dict) and "name" in entry}
    if name not in named:
        near = f"{closest(name, named)} Known: {', '.join(sorted(named))}"
        raise ConfigError(f"override {override!r}: no entry named {name!r}.{near}")
    return named[name]
