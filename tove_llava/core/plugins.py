"""Load parts of a user's own: experts, fusions, benchmarks, templates and formats outside this package.

A plugin is a Python file that registers parts. ``--plugin FILE.py``, a preset's ``plugins`` or the environment variable
``TOVE_PLUGINS`` (files, separated like ``PATH``) names it. An installed package is one by an entry point in the group
``tove_llava.plugins``. The first look-up in a registry loads them all. ``TOVE_PLUGINS`` keeps the files, so that child
processes load them too.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tove_llava.core.errors import ConfigError

VARIABLE = "TOVE_PLUGINS"
GROUP = "tove_llava.plugins"
FLAG = "--plugin"
_PREFIX = "tove_plugin_"  # of the modules that files become

_lock = threading.RLock()
_loaded: dict[str, "Plugin"] = {}  # by module name
_busy = False  # a plugin is being imported; what it looks up must not start over
_last: str | None = None  # value of TOVE_PLUGINS at the last load; None before the first


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin.

    Attributes:
        name: the file's name, or the name of the installed distribution.
        version: SHA-256 of the file, or the distribution's version.
        path: the file; None for a distribution.
    """

    name: str
    version: str
    path: Path | None = None


def load_plugin(file: str | os.PathLike[str]) -> Plugin:
    """Load a file that registers parts of your own.

    Args:
        file: a Python file. It is run like any import, so it has to be trusted.

    Returns:
        its name and the SHA-256 of its content. A file that is loaded already is not run again.

    Raises:
        ConfigError: the file is missing, fails (its line is named), or another plugin has its name.

    Example:
        >>> from pathlib import Path
        >>> import tove_llava
        >>> _ = Path("bare.py").write_text(
        ...     "from tove_llava.data.templates import Segment, Template, register_template\\n"
        ...     "@register_template('documented')\\n"
        ...     "class Documented(Template):\\n"
        ...     "    def render(self, turns, tokenizer):\\n"
        ...     "        return [Segment(turn.text or '', turn.role == 'assistant') for turn in turns]\\n"
        ... )
        >>> tove_llava.load_plugin("bare.py").name
        'bare.py'
    """
    add_plugins([file])
    return _loaded[_module_name(Path(file))]


def add_plugins(files: Iterable[str | os.PathLike[str]]) -> None:
    """Add files to ``TOVE_PLUGINS`` and load them; ConfigError names those that fail."""
    before = _named()
    added = [str(Path(file).absolute()) for file in files]
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys([*before, *added]))
    try:
        load_plugins()
    except ConfigError:
        os.environ[VARIABLE] = os.pathsep.join(before)
        raise


def load_plugins() -> None:
    """Load the files of ``TOVE_PLUGINS`` and the plugins of installed packages, each once.

    Raises:
        ConfigError: files that fail; the others are loaded. A package that fails is only reported.
    """
    global _busy, _last
    with _lock:
        if _busy or _last == os.environ.get(VARIABLE, ""):
            return
        _busy = True
        try:
            if _last is None:
                _load_packages()
            faults = [message for file in _named() if (message := _load_file(Path(file)))]
        finally:
            _busy = False
        if not faults:
            _last = os.environ.get(VARIABLE, "")
    if faults:
        raise ConfigError("; ".join(faults))


def plugin_of(component: Any) -> Plugin | None:
    """Return the plugin that defines a class, function or instance, if one does."""
    module = getattr(component, "__module__", None) or type(component).__module__
    return _loaded.get(module) or _loaded.get(module.partition(".")[0])


def file_plugins() -> list[Plugin]:
    """List the loaded files."""
    return [plugin for plugin in _loaded.values() if plugin.path is not None]


def take_plugin_flags(arguments: Sequence[str]) -> list[str]:
    """Load the files of ``--plugin FILE.py`` flags and all others; return the other arguments.

    Raises:
        ConfigError: a flag without a file, or a file that fails.
    """
    files, rest, waiting = [], [], iter(arguments)
    for word in waiting:
        flag, equals, file = word.partition("=")
        if flag != FLAG:
            rest.append(word)
            continue
        file = file if equals else next(waiting, "")
        if not file:
            raise ConfigError(f"{FLAG} needs a Python file: {FLAG} my_fusion.py")
        files.append(file)
    if files or _named():
        add_plugins(files)
    return rest


def plugin_flags() -> list[str]:
    """Return ``--plugin FILE`` for each file, for a process that does not inherit the environment."""
    return [word for file in _named() for word in (FLAG, file)]


def defining_file(component: Any) -> str:
    """Name the file that defines a component, for messages."""
    module = getattr(component, "__module__", None) or type(component).__module__
    return getattr(sys.modules.get(module), "__file__", None) or module


def _named() -> list[str]:
    return [os.path.abspath(file) for file in os.environ.get(VARIABLE, "").split(os.pathsep) if file]


def _module_name(file: Path) -> str:
    return _PREFIX + file.stem


def _load_file(file: Path) -> str:
    """Import a file, unless it is loaded; return why it failed, or an empty string."""
    module_name = _module_name(file)
    if not file.is_file() or file.suffix != ".py":
        return f"plugin {file}: no such Python file ({FLAG}, {VARIABLE} or a preset's 'plugins' names it)"
    version = hashlib.sha256(file.read_bytes()).hexdigest()
    present = _loaded.get(module_name)
    if present is not None:
        if present.version == version or present.path == file:
            return ""  # an edited file counts as it was when it was loaded
        return f"two plugins are called {file.name}: {present.path} and {file}; rename one of them"
    if not module_name.isidentifier():
        return f"plugin {file}: the file's name must be one word of letters, digits and underscores"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    _loaded[module_name] = Plugin(file.name, version, file)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name], _loaded[module_name]
        return f"plugin {file}{fault(error, file)}"
    return ""


def _load_packages() -> None:
    for entry in importlib.metadata.entry_points(group=GROUP):
        module = entry.module.partition(".")[0]
        if module in _loaded:
            continue
        distribution = entry.dist
        name = distribution.name if distribution is not None else entry.name
        version = distribution.version if distribution is not None else ""
        _loaded[module] = Plugin(name, version)
        try:
            entry.load()
        except Exception as error:
            report(f"the plugin {entry.value} of the package {name} {version}{fault(error)}")


def report(message: str) -> None:
    """Say that some parts are missing; the others work."""
    print(f"tove-llava: {message}. Its parts are missing.", file=sys.stderr, flush=True)


def fault(error: BaseException, file: str | os.PathLike[str] | None = None) -> str:
    """Shorten a traceback to an error and its last line within ``file``: ", line 3: NameError: ..."."""
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    if line is None and file is not None:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == os.fspath(file)]
        line = own[-1].lineno if own else None
    return f"{'' if line is None else f', line {line}'}: {type(error).__name__}: {error}"
