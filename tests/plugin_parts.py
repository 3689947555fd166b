"""Parts of a user's own in tests, forgotten afterwards."""

import os
import sys
from contextlib import contextmanager

from tove_llava.core import plugins
from tove_llava.data.templates.base import TEMPLATES
from tove_llava.eval.benchmarks import BENCHMARKS
from tove_llava.experts import EXPERTS, base
from tove_llava.tower.tower_config import FUSIONS, GATES

REGISTRIES = (FUSIONS, GATES, EXPERTS, TEMPLATES, BENCHMARKS)


@contextmanager
def forgotten():
    """Start without plugins; forget afterwards what was loaded and registered."""
    given = os.environ.pop("TOVE_PLUGINS", None)
    known = {registry: dict(registry._entries) for registry in REGISTRIES if registry.names()}
    families = {name: dict(classes) for name, classes in base._families.items()}
    before = dict(plugins._loaded)
    yield
    for registry, entries in known.items():
        registry._entries = entries
    base._families.clear()
    base._families.update(families)
    for module in set(plugins._loaded) - set(before):
        sys.modules.pop(module, None)
    plugins._loaded.clear()
    plugins._loaded.update(before)
    plugins._last = None
    os.environ.pop("TOVE_PLUGINS", None)
    os.environ.update({} if given is None else {"TOVE_PLUGINS": given})
