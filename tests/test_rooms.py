"""Imports run downward, as docs/architecture.md orders them; its names exist."""

import ast
import re
from pathlib import Path

import tove_llava

PACKAGE = Path(tove_llava.__file__).parent
PAGE = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"
UPWARD = {("serve", "cli")}  # gradio_app is a separate command, which starts the same demo as `tove-llava demo`


def rooms() -> list[str]:
    """List the rooms from the top floor down."""
    return [name for name in re.findall(r"^  (\w+)/ ", PAGE.read_text(), flags=re.M) if name != "bundled"]


def imported(file: Path) -> set[str]:
    """List the rooms that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in modules if name.startswith("tove_llava.")}
    return found


def test_every_room_is_on_the_page():
    assert sorted(rooms()) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_no_import_runs_upward():
    floor = {name: number for number, name in enumerate(rooms())}
    upward = {
        (room, other)
        for room in floor
        for file in (PACKAGE / room).rglob("*.py")
        for other in imported(file)
        if other in floor and floor[other] < floor[room]
    }
    assert upward == UPWARD


def test_files_and_functions_that_the_page_names_exist():
    for name, symbol in re.findall(r"`([\w/.-]+\.(?:py|yaml))`(?: \(`(\w+)`\))?", PAGE.read_text()):
        file = PACKAGE / name
        assert file.is_file() or (PACKAGE.parent / name).is_file(), f"{PAGE.name} names {name}, which is not there"
        assert not symbol or re.search(rf"\b(def|class) {symbol}\b", file.read_text()), f"{name} has no {symbol}"


def test_names_that_pages_import_exist():
    for page in (*PAGE.parent.rglob("*.md"), PAGE.parents[1] / "README.md"):
        for module, names in re.findall(r"^from (tove_llava[\w.]*) import ([\w, ]+)", page.read_text(), flags=re.M):
            place = PACKAGE.parent.joinpath(*module.split("."))
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            assert file.is_file(), f"{page.name} imports {module}, which is not there"
            for name in names.split(", "):
                assert re.search(rf"\b{name}\b", file.read_text()), f"{page.name}: {module} has no {name}"
