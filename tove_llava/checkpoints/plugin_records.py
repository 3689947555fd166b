"""Record the plugins that a model needs, and ask for them when it is opened.

A checkpoint names each plugin that defines its fusion, an expert or its template, with the SHA-256 of the file. It
holds a copy in ``plugins/``, which nothing runs by itself: a checkpoint may come from anybody.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tove_llava.checkpoints.manifest import Manifest, PluginEntry
from tove_llava.core.errors import CheckpointError
from tove_llava.core.paths import inside
from tove_llava.core.plugins import FLAG, VARIABLE, plugin_of
from tove_llava.core.registry import Registry
from tove_llava.core.sources import Source
from tove_llava.data.templates.base import TEMPLATES
from tove_llava.experts.base import EXPERTS
from tove_llava.tower.tower_config import FUSIONS, GATES, ToveVisionConfig

FOLDER = "plugins"
ACCEPT = "TOVE_ACCEPT_CHANGED_PLUGINS"
_REGISTRIES: dict[str, Registry[Any]] = {registry.kind: registry for registry in (FUSIONS, GATES, EXPERTS, TEMPLATES)}


def save_plugins(folder: Path, vision: ToveVisionConfig, template: str) -> list[PluginEntry]:
    """Copy the files of the plugins that a model needs; return their entries for the manifest."""
    found: dict[str, PluginEntry] = {}
    for kind, name, component in _parts(vision, template):
        plugin = plugin_of(component)
        if plugin is None:
            continue
        entry = PluginEntry(plugin.name, plugin.version, plugin.path is not None, {})
        found.setdefault(plugin.name, entry).parts.setdefault(kind, []).append(name)
        target = folder / FOLDER / plugin.name
        if plugin.path is not None and plugin.path.resolve() != target.resolve():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(plugin.path, target)
    return list(found.values())


def plugin_versions(vision: ToveVisionConfig, template: str) -> dict[str, str]:
    """Return the plugins that a model needs, with their versions."""
    used = [plugin for _, _, component in _parts(vision, template) if (plugin := plugin_of(component))]
    return {plugin.name: plugin.version for plugin in used}


def check_plugins(folder: Path, manifest: Manifest) -> None:
    """Check that the plugins of a checkpoint are loaded and as they were in training.

    Raises:
        CheckpointError: one is missing, or another version of it is loaded; the message says how to load it.
    """
    for entry in manifest.plugins:
        for kind, name in ((kind, name) for kind, names in entry.parts.items() for name in names):
            registry = _REGISTRIES.get(kind)
            if registry is None or name not in registry:
                needed = f"{folder} needs {_described(entry)} for its {kind} {name!r}"
                raise CheckpointError(f"{needed}: {_remedy(folder, entry)}")
            plugin = plugin_of(_component(registry.get(name)))
            if plugin is None or plugin.version == entry.version or os.environ.get(ACCEPT) == "1":
                continue  # without a plugin: the part has moved into the package
            raise CheckpointError(
                f"{folder}: {_described(entry)}, which defines its {kind} {name!r}, has changed since training. "
                f"To load the version of training: {_remedy(folder, entry)}. To load the changed one all the same, set "
                f"{ACCEPT}=1"
            )


def _parts(vision: ToveVisionConfig, template: str) -> Iterator[tuple[str, str, Any]]:
    yield FUSIONS.kind, vision.fusion, FUSIONS.get(vision.fusion)
    gate = str((vision.fusion_options or {}).get("gate", ""))
    if gate in GATES:
        yield GATES.kind, gate, GATES.get(gate)
    for spec in vision.expert_specs:
        yield EXPERTS.kind, spec.expert, EXPERTS.get(spec.expert).get(Source.parse(spec.source).architecture.scheme)
    if template in TEMPLATES:
        yield TEMPLATES.kind, template, TEMPLATES.get(template)


def _component(registered: Any) -> Any:
    """Return a class of an expert's family, or the component itself."""
    if not isinstance(registered, dict):
        return registered
    return next((cls for cls in registered.values() if plugin_of(cls)), None)


def _described(entry: PluginEntry) -> str:
    return f"the plugin {entry.name}" if entry.file else f"the package {entry.name} {entry.version}"


def _remedy(folder: Path, entry: PluginEntry) -> str:
    if not entry.file:
        return f"pip install {entry.name}=={entry.version}"
    copy = inside(folder / FOLDER, entry.name)
    return f"{FLAG} {copy} (in Python {VARIABLE}={copy}). It is code: read it before you run it"
