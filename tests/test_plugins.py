"""Parts of a user's own, from a file or an installed package, and checkpoints that need them."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from plugin_parts import forgotten
from stage_parts import train_stages
from train_parts import flags

from tove_llava import load_model, load_plugin
from tove_llava.cli import main as command
from tove_llava.core import plugins
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.data.templates import template_names
from tove_llava.data.templates.base import TEMPLATES
from tove_llava.presets import load_preset
from tove_llava.tower.tower_config import FUSIONS
from tove_llava.train.run import main as train

TEMPLATE = """
from tove_llava.data.templates import Segment, Template, register_template
{before}
@register_template("{name}")
class Own(Template):
    def render(self, turns, tokenizer):
        return [Segment(turn.text or "", turn.role == "assistant") for turn in turns]
{after}
"""
FUSION = """
from tove_llava.tower.fusion import FUSIONS
from tove_llava.tower.fusion.add import AddFusion

@FUSIONS.register("own_add")
class OwnAdd(AddFusion):
    pass
"""


@pytest.fixture(autouse=True)
def without_plugins():
    with forgotten():
        yield


def write(file, name="own", before="", after=""):
    file.parent.mkdir(exist_ok=True)
    file.write_text(TEMPLATE.format(name=name, before=before, after=after))
    return str(file)


def test_a_file_registers_parts_once_and_child_processes_inherit_it(tmp_path):
    file = write(tmp_path / "mine.py")
    first = load_plugin(file)
    assert "own" in template_names() and load_plugin(file) == first and os.environ["TOVE_PLUGINS"] == file
    assert plugins.plugin_of(TEMPLATES.get("own")) == first and plugins.plugin_of(TEMPLATES.get("v1")) is None
    assert plugins.plugin_flags() == ["--plugin", file]


def test_the_environment_and_a_preset_name_files(tmp_path, monkeypatch):
    write(tmp_path / "below.py", "below")
    write(tmp_path / "sub" / "above.py", "above")
    (tmp_path / "base.yaml").write_text("extends: tiny\nplugins: [below.py]\n")
    (tmp_path / "sub" / "mine.yaml").write_text("extends: ../base.yaml\nplugins: [above.py]\n")
    monkeypatch.chdir(tmp_path / "sub")
    load_preset("mine.yaml")
    monkeypatch.setenv("TOVE_PLUGINS", write(tmp_path / "third.py", "third"))
    assert {"below", "above", "third"} <= set(template_names())


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--plugin"], "--plugin needs a Python file"),
        (["--plugin", "absent.py"], "absent.py: no such Python file"),
        (["--plugin=broken.py"], r"broken.py, line 3: ModuleNotFoundError: No module named 'nowhere'"),
        (["--plugin", "syntax.py"], r"syntax.py, line 3: SyntaxError"),
        (["--plugin", "fine.py", "--plugin", "other/fine.py"], "two plugins are called fine.py"),
        (
            ["--plugin", "fine.py", "--plugin", "twice.py"],
            "twice.py, line 4: .*'own' is registered twice, in",
        ),
        (["--plugin", "two-words.py"], "must be one word"),
    ],
)
def test_bad_plugins_are_named_and_the_others_load(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("fine", "two-words"):
        write(tmp_path / f"{name}.py")
    write(tmp_path / "other" / "fine.py", "other")
    write(tmp_path / "twice.py")
    write(tmp_path / "broken.py", "broken", before="import nowhere")
    write(tmp_path / "syntax.py", "syntax", before="def (")
    last = write(tmp_path / "last.py", "last")
    assert command(["experts", "--plugin", last, *arguments]) == 2
    error = capsys.readouterr().err

    assert re.search(expected, error) and "Traceback" not in error
    assert arguments == ["--plugin"] or "last" in template_names()


def test_a_plugin_cannot_take_the_name_of_a_part_of_the_package(tmp_path):
    """Also as the first thing that a process loads."""
    template = TEMPLATE.format(name="v1", before="", after="")
    for name, code in (("fusion", FUSION.replace("own_add", "add")), ("template", template)):
        (tmp_path / f"{name}.py").write_text(code)
        words = [sys.executable, "-m", "tove_llava", "check", str(tmp_path / f"{name}.py")]
        ended = subprocess.run(words, capture_output=True, text=True)
        assert ended.returncode == 2 and "is registered twice, in" in ended.stderr and f"{name}.py" in ended.stderr


def test_a_failed_file_can_be_mended_and_loaded_again(tmp_path):
    file = write(tmp_path / "mine.py", after="import nowhere")
    with pytest.raises(ConfigError, match="line 8: ModuleNotFoundError"):
        load_plugin(file)
    write(tmp_path / "mine.py")
    load_plugin(file)
    assert "own" in template_names()


def test_an_installed_package_is_a_plugin_and_one_that_fails_is_only_reported(tmp_path, monkeypatch, capsys):
    (tmp_path / "their_parts.py").write_text(TEMPLATE.format(name="theirs", before="", after=""))
    lines = "[tove_llava.plugins]\nparts = their_parts\nbroken = no_such_module\n"
    (tmp_path / "their_parts-1.2.dist-info").mkdir()
    (tmp_path / "their_parts-1.2.dist-info" / "entry_points.txt").write_text(lines)
    (tmp_path / "their_parts-1.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: their-parts\nVersion: 1.2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert any(entry.dist.name == "their-parts" for entry in importlib.metadata.entry_points(group=plugins.GROUP))
    plugins._last = None
    assert "theirs" in template_names()
    assert plugins.plugin_of(TEMPLATES.get("theirs")) == plugins.Plugin("their-parts", "1.2")
    assert "no_such_module of the package their-parts 1.2: ModuleNotFoundError" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A stage 1 of a fusion of one's own, whose plugin is forgotten."""
    folder = tmp_path_factory.mktemp("plugin")
    train_stages(folder)
    (folder / "mine").mkdir()
    file = folder / "mine" / "own_add.py"
    file.write_text(FUSION)
    more = ("--plugin", str(file), "--set", "vision.fusion=own_add", "--max_steps", "1")
    with forgotten():
        assert train(flags(folder, "pretrain", folder / "model", *more)) == 0
    return folder


def test_a_checkpoint_names_its_plugin_and_holds_a_copy(trained, capsys):
    model = trained / "model"
    [entry] = json.loads((model / "tove_llava.json").read_text())["plugins"]
    assert entry["name"] == "own_add.py" and entry["parts"] == {"fusion": ["own_add"]}
    assert (model / "plugins" / "own_add.py").read_text() == FUSION
    assert json.loads((model / "run.json").read_text())["plugins"] == {"own_add.py": entry["version"]}
    with pytest.raises(CheckpointError, match="needs the plugin own_add.py .*'own_add': --plugin .*model/plugins"):
        load_model(model)
    assert "own_add" not in FUSIONS  # nothing ran the copy
    load_plugin(model / "plugins" / "own_add.py")
    assert type(load_model(model)[0].tower.fusion).__name__ == "OwnAdd"


def test_a_changed_plugin_is_refused_unless_it_is_accepted(trained, tmp_path, monkeypatch):
    changed = tmp_path / "own_add.py"
    changed.write_text(FUSION + "\nCHANGED = True\n")
    load_plugin(changed)
    with pytest.raises(CheckpointError, match="own_add.py.* has changed since training.*TOVE_ACCEPT_CHANGED"):
        load_model(trained / "model")
    monkeypatch.setenv("TOVE_ACCEPT_CHANGED_PLUGINS", "1")
    load_model(trained / "model")


def test_damaged_entries_are_an_error(trained, tmp_path):
    copy = shutil.copytree(trained / "model", tmp_path / "model")
    manifest = json.loads((copy / "tove_llava.json").read_text())
    for entries in (
        [{"name": 1}],
        ["x"],
        [manifest["plugins"][0] | {"parts": [1]}],
        [manifest["plugins"][0] | {"more": 1}],
        7,
    ):
        (copy / "tove_llava.json").write_text(json.dumps(manifest | {"plugins": entries}))
        with pytest.raises(CheckpointError, match="damaged"):
            load_model(copy)
