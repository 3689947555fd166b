"""Build experts from the entries of a preset."""

from os import PathLike
from typing import Any

from tove_llava.core.errors import ConfigError
from tove_llava.core.sources import Source
from tove_llava.experts.base import EXPERTS, Expert
from tove_llava.experts.spec import ExpertSpec


def build_expert(spec: ExpertSpec | dict[str, Any], base_dir: str | PathLike[str] | None = None) -> Expert:
    """Build a spec's expert, without weights; ConfigError names what is unknown."""
    spec = ExpertSpec.from_dict(spec)
    scheme = Source.parse(spec.source).architecture.scheme if spec.source else ""
    if spec.expert == spec.name and spec.expert not in EXPERTS and scheme in EXPERTS:
        spec = spec.replace(expert=scheme)  # the scheme's own expert reads any model of the library
    family = EXPERTS.get(spec.expert)
    if not spec.source:
        return next(iter(family.values()))(spec, base_dir)
    if scheme not in family:
        hint = f"; 'expert: {scheme}' reads any model of {scheme}" if scheme in EXPERTS else ""
        raise ConfigError(
            f"expert {spec.name!r}: {spec.expert!r} cannot be read from {spec.source!r}, "
            f"only from sources that begin with {', '.join(s + ':' for s in family)}{hint}"
        )
    return family[scheme](spec, base_dir)


def complete_specs(entries: list[Any], base_dir: str | PathLike[str] | None = None) -> list[ExpertSpec]:
    """Fill in sources and sizes of specs, as a config records them."""
    specs = []
    for entry in entries:
        expert = build_expert(entry, base_dir)
        spec = expert.spec
        specs.append(spec if base_dir else spec.replace(source=str(Source.parse(spec.source).absolute())))
    check_names(specs)
    return specs


def check_names(specs: list[ExpertSpec]) -> None:
    """Raise ConfigError if two specs share a name."""
    names = [spec.name for spec in specs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"two experts are called {sorted(twice)[0]!r}; give each its own name")
