"""Settings from mappings: nested values, and errors that name the key."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from tove_llava.core.errors import ConfigError
from tove_llava.core.mappings import from_mapping, parse_yaml


@dataclass
class Part:
    size: int
    rate: float = 0.5


@dataclass
class Whole:
    name: str
    title: str
    part: Part | None = None
    parts: tuple[Part, ...] = ()
    named: Mapping[str, Part] = field(default_factory=dict)
    layers: list[int] | None = None
    open: bool = False


def test_nested_values_are_built():
    mapping = {"title": "t", "part": {"size": 1, "rate": 2}, "parts": [{"size": 3}], "named": {"a": {"size": 4}}}
    assert from_mapping(Whole, mapping, "file", name="n") == Whole(
        "n", "t", Part(1, 2), (Part(3),), {"a": Part(4)}, layers=None
    )
    assert from_mapping(Whole, {"title": "t", "part": None, "named": None, "layers": [1]}, "file", name="n").named == {}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ([], r"file: expected a mapping"),
        ({"tilte": "t"}, r"file: unknown key 'tilte'\. Did you mean 'title'\? Known: title, part"),
        ({"title": "t", "name": "n"}, "unknown key 'name'"),
        ({}, "file: needs a 'title'"),
        ({"title": 3}, "file: title: expected str, got 3"),
        ({"title": "t", "part": {"size": 1, "rate": "1e-3"}}, r"file: part\.rate: expected float.*wants a dot"),
        ({"title": "t", "parts": [{"size": 1}, {}]}, r"file: parts\[1\]: needs a 'size'"),
        ({"title": "t", "named": {"a": {"siz": 1}}}, r"file: named\.a: unknown key 'siz'"),
        ({"title": "t", "layers": "12"}, "file: layers: expected a list"),
        ({"title": "t", "layers": [True]}, r"file: layers\[0\]: expected int"),
        ({"title": "t", "open": 1}, "file: open: expected bool"),
        ({"title": "t", "part": {"size": 1, "rate": float("nan")}}, r"file: part\.rate: expected a finite number"),
        ({"title": "t", "part": {"size": 10**400}}, r"file: part\.size: expected a finite number"),
    ],
)
def test_mistakes_are_named_with_their_place(mapping, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Whole, mapping, "file", name="n")


@pytest.mark.parametrize(
    "text", ["a: [", "a: 2024-13-45", "a: " + "9" * 5000, "[" * 5000, "a: !!python/object:os.system x", "\0"]
)
def test_text_that_is_no_yaml_is_named(text):
    with pytest.raises(ConfigError, match="x.yaml: not valid YAML: "):
        parse_yaml(text, "x.yaml")
    assert parse_yaml("a: [1, b]", "x.yaml") == {"a": [1, "b"]}
