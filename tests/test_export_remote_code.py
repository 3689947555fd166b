"""``export --format remote-code``: a model with experts, without this package."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from answer_parts import picture
from experts_zoo import CASES
from export_parts import (
    QUESTION,
    ask_elsewhere,
    checkpoint,
    compare,
    compare_in_clean_environment,
    run_card,
    run_elsewhere,
)
from tower_parts import save_clip

from tove_llava.checkpoints.conversion import export_model
from tove_llava.checkpoints.flatten import flat_name, flatten_modules, third_party_imports
from tove_llava.core.errors import ConfigError
from tove_llava.inference.generation import Answerer
from tove_llava.tower import ToveVisionConfig


@pytest.mark.parametrize(
    "tower", [{}, {"detached": ("edge",), "top_k": 1, "null_slot": True}, {"fusion": "none", "names": ()}]
)
def test_same_model_without_this_package(tmp_path, tower):
    """Experts of an outside file go along; the originals are gone."""
    model = checkpoint(tmp_path, **tower)
    export_model(model, tmp_path / "out", "remote-code")
    picture(5, (40, 24)).save(tmp_path / "wide.png")
    moved = tmp_path / "elsewhere" / "model"
    moved.parent.mkdir()
    (tmp_path / "out").rename(moved)
    (tmp_path / "parts").rename(tmp_path / "hidden")
    seen = ask_elsewhere(moved, tmp_path / "wide.png", QUESTION, tmp_path, trust=True)
    assert seen["hidden"] == [] and seen["config"] == "ToveLlavaConfig"
    assert seen["module"].startswith("transformers_modules.")
    (tmp_path / "hidden").rename(tmp_path / "parts")
    with_experts = compare(model, seen, tmp_path / "wide.png")
    if "fusion" not in tower:  # the experts take part at all
        answerer = Answerer.load(model, "cpu", "float32")
        answerer.tower.detach_experts(answerer.tower.config.expert_names)
        with torch.no_grad():
            bare = answerer.model(input_ids=seen["ids"], pixel_values=seen["pixels"]).logits
        assert not torch.allclose(bare, with_experts, atol=1e-2)


@pytest.mark.slow
def test_loads_in_an_environment_of_its_own(tmp_path):
    model = checkpoint(tmp_path)
    export_model(model, tmp_path / "out", "remote-code")
    picture(5, (40, 24)).save(tmp_path / "wide.png")
    compare_in_clean_environment(model, tmp_path / "out", tmp_path / "wide.png", QUESTION, tmp_path, trust=True)


def test_experts_of_every_library_go_along(tmp_path):
    """timm reads open_clip's tower by value, so only timm is needed."""
    wanted = {"dinov2", "eva", "depth", "segmentation"}
    cases = {k: c for k, c in CASES.items() if c.expert in wanted | {"normal"} and c.mode == "features"}
    entries = [case.spec(tmp_path / key, name=f"e{i}") for i, (key, case) in enumerate(cases.items())]
    assert {entry["expert"] for entry in entries} >= wanted
    vision = ToveVisionConfig.from_sources(save_clip(tmp_path / "clip"), entries, projection_dim=10)
    model = checkpoint(tmp_path, vision=vision)
    [remark] = export_model(model, tmp_path / "out", "remote-code")
    assert "timm" in remark and "kornia" not in remark and "open_clip" not in remark
    picture(5, (40, 24)).save(file := tmp_path / "wide.png")
    hidden = ("tove_llava", "kornia", "open_clip")
    compare(model, ask_elsewhere(tmp_path / "out", file, QUESTION, tmp_path, trust=True, hidden=hidden), file)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    model = checkpoint(root)
    export_model(model, root / "out", "remote-code")
    return root / "out"


def test_only_what_the_model_needs_goes_along(out):
    files = {file.name: file.read_text() for file in out.glob("*.py")}
    libraries = {"huggingface_hub", "numpy", "safetensors", "torch", "transformers", "yaml"}
    assert third_party_imports(files.values()) <= libraries | {"tove_llava"}
    assert "tower_parts.py" in files and "tove_llava_tower_fusion_tove_gate.py" in files
    assert not [name for name in files if "edge" in name or "timm" in name or "none" in name or "train" in name]
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not node.module.startswith("tove_llava"), name
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "modeling_tove_llava.ToveLlavaConfig"
    assert {entry["source"] for entry in config["vision_config"]["experts"]} == {
        f"hf:./backbones/experts/{name}" for name in ("depth", "edge", "normal")
    }
    assert str(out.parent) not in (out / "config.json").read_text() + (out / "README.md").read_text()


def test_code_of_the_card_runs(out, tmp_path):
    picture(5, (40, 24)).save(tmp_path / "wide.png")
    assert run_card(out, tmp_path / "wide.png", tmp_path)


def test_code_is_the_packages_own_text(out):
    from tove_llava.tower import gate

    own, exported = (
        [line for line in file.read_text().splitlines() if "tove_llava" not in line]  # all but imports and registries
        for file in (Path(gate.__file__), out / "tove_llava_tower_gate.py")
    )
    assert own == exported


def test_two_folders_in_one_process(out, tmp_path):
    shutil.copytree(out, tmp_path / "second")
    code = f"""
from transformers import AutoModelForImageTextToText as Auto
models = [Auto.from_pretrained(d, trust_remote_code=True) for d in ({str(out)!r}, {str(tmp_path / "second")!r})]
assert len({{type(m) for m in models}}) == len({{type(m.tower) for m in models}}) == 2
assert all(m.tower.is_loaded for m in models)
"""
    run_elsewhere(code, [], tmp_path)


# -- flatten -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def flat(tmp_path, monkeypatch):
    """The flat modules of a package ``zoo``, a keeper and a lion."""

    def write(keeper, lion):
        (tmp_path / "zoo" / "cats").mkdir(parents=True)
        (tmp_path / "zoo" / "__init__.py").touch()
        (tmp_path / "zoo" / "cats" / "__init__.py").write_text("from zoo.cats.lion import Lion as King, roar\n")
        (tmp_path / "zoo" / "cats" / "lion.py").write_text(lion)
        (tmp_path / "zoo" / "keeper.py").write_text(keeper)
        return flatten_modules(["zoo.keeper"], "zoo")

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "zoo"]:
        del sys.modules[name]


def test_reexported_names_come_from_where_they_are_defined(flat):
    files = flat(
        "import os\n\nfrom zoo.cats import (\n    King,  # with a comment\n    roar as noise,\n)\n\n\n"
        "def feed():\n    from zoo.cats.lion import Lion\n\n    return Lion  # ünïcode\n",
        "roar = 'é'\n\n\nclass Lion: ...\n",
    )
    assert set(files) == {"zoo_keeper.py", "zoo_cats_lion.py"}
    assert files["zoo_keeper.py"] == (
        "import os\n\nfrom .zoo_cats_lion import Lion as King, roar as noise\n\n\n"
        "def feed():\n    from .zoo_cats_lion import Lion\n\n    return Lion  # ünïcode\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [("from . import cats", "relative"), ("import zoo.cats", "from zoo"), ("from zoo.cats import tiger", "tiger")],
)
def test_imports_that_cannot_be_flat_are_refused(flat, text, message):
    with pytest.raises(ConfigError, match=message):
        flat(f"{text}\n", "roar = 1\n")


def test_every_module_of_tower_and_experts_can_be_flat():
    """Modules that no test model uses must not fail the export."""
    import tove_llava

    root = Path(tove_llava.__file__).parent
    modules = [
        ".".join(("tove_llava", *file.relative_to(root).with_suffix("").parts))
        for folder in ("tower", "experts")
        for file in (root / folder).rglob("*.py")
        if file.name != "__init__.py"
    ]
    files = flatten_modules(modules)
    assert {f"{flat_name(module)}.py" for module in modules} <= set(files)
    for name, text in files.items():
        imported = [
            alias.name if isinstance(node, ast.Import) else node.module or ""
            for node in ast.walk(ast.parse(text, name))
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
            for alias in node.names
        ]
        assert not [module for module in imported if module.split(".")[0] == "tove_llava"], name
