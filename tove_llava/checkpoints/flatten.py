"""Flatten a package's sources into one folder, for use as remote code.

``tove_llava/tower/gate.py`` becomes ``tove_llava_tower_gate.py``, and ``from tove_llava.tower import X`` in it becomes
``from .tove_llava_tower_tower_config import X``: a re-exported name is imported from the module that defines it. So no
``__init__.py`` is needed, and the import of one registers nothing. Only modules that are reached from the roots are
written. A :class:`~tove_llava.core.registry.Registry` no longer searches its package; the caller imports what has to be
registered.
"""

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from tove_llava.core.errors import ConfigError

_REGISTRY = "Registry"


def flatten_modules(roots: Iterable[str], package: str = "tove_llava") -> dict[str, str]:
    """Collect the sources of ``roots`` and of all modules they import.

    Args:
        roots: dotted names of modules. For one outside ``package``, only its imports from ``package`` are followed.
        package: dotted name of the package; only its modules are collected, and imports of it rewritten.

    Returns:
        file name -> source, e.g. ``{"tove_llava_core_errors.py": ...}``.
    """
    files: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        name = f"{flat_name(module)}.py"
        if name in files:
            continue
        files[name], reached = _rewrite(module, package)
        waiting += reached
    return dict(sorted(files.items()))


def flat_name(module: str) -> str:
    """Flatten a name: ``tove_llava.tower.gate`` becomes ``tove_llava_tower_gate``."""
    return module.replace(".", "_")


def third_party_imports(files: Iterable[str]) -> set[str]:
    """List the libraries that sources import, without this package and Python's own."""
    import sys

    found = set()
    for text in files:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def _source_file(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(f"module {module} has no Python source, so it cannot go along as remote code")
    return Path(spec.origin)


def _rewrite(module: str, package: str) -> tuple[str, list[str]]:
    """Return a module's source with flat imports, and what it imports."""
    text = _source_file(module).read_text(encoding="utf-8")
    edits: list[tuple[ast.stmt | ast.expr, str]] = []
    reached: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            if any(_belongs(alias.name, package) for alias in node.names):
                raise ConfigError(f"{module}: write 'from {package}... import ...', which can be made flat")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ConfigError(f"{module}: relative imports cannot be made flat; write out {package}")
            if node.module is None or not _belongs(node.module, package):
                continue
            statements = []
            for alias in node.names:
                home, name = _home(node.module, alias.name, package)
                reached.append(home)
                local = alias.asname or alias.name
                renamed = f" as {local}" if alias.asname or local != name else ""
                statements.append(f"from .{flat_name(home)} import {name}{renamed}")
            indent = " " * node.col_offset
            edits.append((node, f"\n{indent}".join(_joined(statements))))
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Subscript)):
            edits += [(argument, "None") for argument in _searched_packages(node, package)]
    return _edited(text, edits), reached


def _belongs(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _home(module: str, name: str, package: str) -> tuple[str, str]:
    """Return the module that defines an imported name, and the name there."""
    file = _source_file(module)
    if file.name != "__init__.py":
        return module, name
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and _belongs(node.module, package):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _home(node.module, alias.name, package)
    raise ConfigError(
        f"{module} does not import {name!r} from one of its modules, so an import of it cannot be made flat; import "
        "the defining module instead"
    )


def _joined(statements: list[str]) -> list[str]:
    """Join the statements of each module, keeping the order of names."""
    by_module: dict[str, list[str]] = {}
    for statement in statements:
        head, _, name = statement.partition(" import ")
        by_module.setdefault(head, []).append(name)
    return [f"{head} import {', '.join(names)}" for head, names in by_module.items()]


def _searched_packages(call: ast.Call, package: str) -> list[ast.expr]:
    """List the argument of ``Registry(...)`` that names the package to search."""
    called = call.func.value if isinstance(call.func, ast.Subscript) else call.func
    if not isinstance(called, ast.Name) or called.id != _REGISTRY:
        return []
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return [
        value
        for value in values
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and _belongs(value.value, package)
    ]


def _edited(text: str, edits: list[tuple[ast.stmt | ast.expr, str]]) -> str:
    """Replace the text of nodes; everything else stays, comments included."""
    lines = text.encode("utf-8").splitlines(keepends=True)  # ast counts columns in bytes
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    data = b"".join(lines)
    for node, replacement in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        data = data[:start] + replacement.encode("utf-8") + data[end:]
    return data.decode("utf-8")
