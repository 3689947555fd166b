"""The package's public names, the modules it imports, and its data files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tove_llava


def test_every_public_name_can_be_imported():
    assert all(getattr(tove_llava, name) is not None for name in tove_llava.__all__)
    assert set(tove_llava.__all__) <= set(dir(tove_llava))


def test_names_for_type_checkers_are_the_names_at_run_time():
    tree = ast.parse(Path(tove_llava.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {alias.name: node.module for node in block.body for alias in node.names}
    assert declared == tove_llava._HOME_OF
    assert set(declared) | {"__version__"} == set(tove_llava.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'build_modle'"):
        tove_llava.build_modle  # noqa: B018


def test_importing_the_package_is_light_and_the_tower_registers_itself():
    program = (
        "import sys, tove_llava; assert 'torch' not in sys.modules; "
        "tove_llava.ToveVisionConfig; "
        "from transformers import AutoConfig; print(AutoConfig.for_model('tove_vision').model_type)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("tove_vision"), done.stderr


def test_every_data_file_is_installed():
    root = Path(tove_llava.__file__).parent
    text = (root.parent / "pyproject.toml").read_text()
    (line,) = re.findall(r"^tove_llava = \[(.*)\]$", text, flags=re.MULTILINE)
    installed = {file for pattern in re.findall(r'"([^"]+)"', line) for file in root.glob(pattern)}
    tracked = subprocess.run(["git", "ls-files", "."], cwd=root, capture_output=True, text=True, check=True).stdout
    for file in tracked.split():
        assert file.endswith(".py") or root / file in installed, f"{file} would not be installed"
