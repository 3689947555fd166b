"""Folders that came from anybody: none of their code runs, and no path leaves them."""

import ast
import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from experts_zoo import CASES
from safetensors.torch import load_file, save_file
from stage_parts import edit_manifest

import tove_llava
from tove_llava.analysis.detach import detach_checkpoint
from tove_llava.checkpoints.base import Request, read_parts
from tove_llava.core.errors import CheckpointError, ToveError
from tove_llava.core.paths import check_folder, way_out
from tove_llava.core.sources import Source
from tove_llava.data import load_tokenizer
from tove_llava.experts import build_expert

PACKAGE = Path(tove_llava.__file__).parent
CODE = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\n"
AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoTokenizer",
        "AutoProcessor", "AutoImageProcessor", "AutoModelForSemanticSegmentation")  # fmt: skip


def edit(file, change):
    """Change a JSON file's object, or write a new one."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    change(content)
    file.write_text(json.dumps(content))


def plant(folder, marker, strange):
    """Put code into a model folder, and name it wherever a library looks for names of code.

    With ``strange`` the folder says that only this code can read it.
    """
    for name in ("evil", "modeling_evil"):
        (folder / f"{name}.py").write_text(CODE.format(marker=str(marker)))
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))
    names = {auto: "evil.Evil" for auto in AUTO}

    def change(content):
        content["auto_map"] = names
        for key in ("text_config", "vision_config"):
            if isinstance(content.get(key), dict):
                content[key]["auto_map"] = names

    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "generation_config.json"):
        if (folder / name).is_file():
            edit(folder / name, change)
    edit(folder / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}))
    edit(folder / "generation_config.json", lambda content: content.update(custom_generate="custom_generate"))
    if strange:
        edit(folder / "tokenizer_config.json", lambda content: content.update(tokenizer_class="EvilTokenizer"))
        if (folder / "processor_config.json").is_file():
            edit(folder / "processor_config.json", lambda content: content.update(processor_class="EvilProcessor"))
        if not (folder / "tove_llava.json").is_file():
            edit(folder / "config.json", lambda content: content.update(model_type="evil"))


def copied(source, target):
    return Path(shutil.copytree(source, target))


def as_model(folder):
    model, processor = tove_llava.load_model(folder)
    return processor


def with_language(kinds, folder):
    copied(kinds / "lora", folder)
    copied(kinds / "llm", folder / "language")
    edit_manifest(folder, language={"source": "hf:./language"})
    return folder / "language"


def with_expert(kinds, folder):
    copied(kinds / "full", folder)
    copied(kinds / "normal", folder / "depth")
    edit(folder / "config.json", lambda c: c["vision_config"]["experts"][0].update(source="hf:./depth"))
    return folder / "depth"


def with_clip(kinds, folder):
    copied(kinds / "stage1", folder)
    copied(kinds / "clip", folder / "clip")
    edit(folder / "config.json", lambda c: c["vision_config"].update(clip_source="hf:./clip"))
    return folder / "clip"


def whole(kind):
    return lambda kinds, folder: copied(kinds / kind, folder)


# Name of a route -> where it is planted, and how a user opens the folder.
ROUTES = {
    "stage1": (whole("stage1"), as_model),
    "lora": (whole("lora"), as_model),
    "full": (whole("full"), as_model),
    "full from_pretrained": (whole("full"), tove_llava.ToveLlavaForConditionalGeneration.from_pretrained),
    "tower": (whole("full"), tove_llava.load_tower),
    "language": (with_language, as_model),
    "expert": (with_expert, as_model),
    "clip": (with_clip, as_model),
    "clip of a tower": (with_clip, tove_llava.load_tower),
    "tokenizer": (whole("llm"), load_tokenizer),
}


@pytest.fixture
def answers_yes(monkeypatch, tmp_path):
    """Everything that asks is told yes; the list of what was asked."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "yes")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return asked


@pytest.mark.parametrize("strange", [False, True], ids=["known", "strange"])
@pytest.mark.parametrize("route", ["llava-hf", "llava-hf as it is", "original"])
def test_no_code_of_another_format_runs(route, strange, world, tmp_path, answers_yes):
    marker, folder = tmp_path / "ran", copied(world.hf if "hf" in route else world.whole, tmp_path / "model")
    plant(folder, marker, strange)
    for opened in (tove_llava.load_model, tove_llava.load_tower):
        try:
            opened(folder, **({"keep_stock": True} if "is" in route and opened is tove_llava.load_model else {}))
        except ToveError as error:
            assert strange and str(tmp_path) in str(error), error
    assert not marker.exists() and answers_yes == []


@pytest.mark.parametrize("strange", [False, True], ids=["known", "strange"])
@pytest.mark.parametrize("route", ROUTES)
def test_no_code_of_a_folder_runs(route, strange, kinds, tmp_path, answers_yes):
    make, opened = ROUTES[route]
    marker, folder = tmp_path / "ran", tmp_path / "model"
    plant(make(kinds, folder), marker, strange)
    try:
        opened(folder)
    except ToveError as error:
        assert strange and str(tmp_path) in str(error), error
    assert not marker.exists() and answers_yes == []


@pytest.mark.parametrize("key", ["eva-open_clip", "dinov2", "depth-segformer", "depth-anything"])
def test_no_code_of_an_experts_folder_runs(key, tmp_path, answers_yes):
    spec, marker = CASES[key].spec(tmp_path / "expert"), tmp_path / "ran"
    plant(tmp_path / "expert", marker, strange=False)
    build_expert(spec).load()
    assert not marker.exists() and answers_yes == []


def test_the_command_asks_nothing(kinds, tmp_path):
    marker = tmp_path / "ran"
    plant(copied(kinds / "lora", tmp_path / "model"), marker, strange=True)
    command = [sys.executable, "-m", "tove_llava", "chat", "--model", tmp_path / "model", "--question", "What?"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=environment, input="yes\n" * 9, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "code of its own" in done.stderr and "Traceback" not in done.stderr
    assert not marker.exists() and "[y/N]" not in done.stdout


def test_every_call_of_transformers_refuses_code():
    """Only the shared function calls from_pretrained; it and from_config are given the refusal."""
    loose = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            on_auto = called == "from_config" and getattr(node.func.value, "id", "").startswith("Auto")
            if called == "from_pretrained" or on_auto:
                given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
                if given.get("trust_remote_code", True) is not False:
                    loose.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert loose == []


# -- paths ------------------------------------------------------------------------------------------------------------


def test_the_rule_of_paths(tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    for file in (folder / "a", folder / "sub" / "b", outside / "c"):
        file.write_text("")
    (folder / "inner").symlink_to("sub/b")
    (folder / "outer").symlink_to(outside / "c")
    (folder / "door").symlink_to(outside)
    (tmp_path / "link").symlink_to(folder)
    good = ["a", "sub/b", "./a", "sub/../a", str(folder / "a"), "inner", "..a", "absent"]
    bad = [
        "../outside/c",
        "sub/../../outside/c",
        str(outside / "c"),
        "outer",
        "door/c",
        "..",
        "a\0b",
    ]
    assert [name for name in good if way_out(folder, name) or way_out(tmp_path / "link", name.split("/")[-1])] == []
    assert [name for name in bad if not way_out(folder, name)] == []
    assert not way_out(folder, "outer", links=True) and way_out(folder, "../outside/c", links=True)


def test_a_snapshot_of_the_hubs_cache_opens(kinds, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    copied(kinds / "full", snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, file in enumerate(sorted(file for file in snapshot.rglob("*") if file.is_file())):
        blob = tmp_path / "models--a--b" / "blobs" / str(number)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    tove_llava.load_model(snapshot)
    copied(kinds / "full", tmp_path / "models--c--d" / "blobs")
    for other in (kinds / "full", tmp_path / "models--c--d" / "blobs"):  # not of this repository
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(other / "config.json")
        with pytest.raises(CheckpointError, match=r"'config.json' leads through a link"):
            tove_llava.load_model(snapshot)


def in_shards(folder, place):
    """Write a folder's weights as shards, one of which the index puts at ``place``."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], place: names[len(names) // 2 :]}
    for name, part in halves.items():
        save_file({each: tensors[each] for each in part}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    where = {each: name for name, part in halves.items() for each in part}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("place", ["b.safetensors", "../b.safetensors", "{root}/b.safetensors"])
@pytest.mark.parametrize("kind", ["full", "llava-hf", "llava-hf as it is", "tower", "language"])
def test_shards_lie_in_their_folder(kind, place, kinds, world, tmp_path):
    folder, place = tmp_path / "model", place.format(root=tmp_path)
    if kind == "language":
        in_shards(with_language(kinds, folder), place)
    else:
        in_shards(copied(world.hf if "hf" in kind else kinds / "full", folder), place)
    options = {"keep_stock": True} if "as it is" in kind else {}
    opened = tove_llava.load_tower if kind == "tower" else lambda folder: tove_llava.load_model(folder, **options)
    if place == "b.safetensors":
        opened(folder)
    else:
        with pytest.raises(CheckpointError, match=r"index.json: '.*b.safetensors' (leads out of|is an absolute path)"):
            opened(folder)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("lora", "tove_llava.json"), ("lora", "config.json"), ("lora", "adapter_model.safetensors"),
        ("lora", "adapter_config.json"), ("lora", "trained.safetensors"), ("lora", "tokenizer.json"),
        ("lora", "processor_config.json"), ("full", "model.safetensors"), ("full", "generation_config.json"),
    ],
)  # fmt: skip
def test_links_of_files_stay_in_their_folder(kind, name, kinds, tmp_path):
    folder = copied(kinds / kind, tmp_path / "model")
    (folder / name).rename(folder / "real")
    (folder / name).symlink_to("real")
    tove_llava.load_model(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(kinds / kind / name)
    for opened in (tove_llava.load_model, tove_llava.load_tower, lambda folder: read_parts(folder, Request())):
        with pytest.raises(CheckpointError, match=f"{name}' leads through a link"):
            opened(folder)


def test_a_copied_part_holds_no_link_out(kinds, tmp_path):
    part = with_language(kinds, tmp_path / "model")
    (part / "notes").mkdir()
    (part / "notes" / "secret.json").symlink_to(kinds / "preset.yaml")
    with pytest.raises(CheckpointError, match="secret.json' leads through a link"):
        detach_checkpoint(tmp_path / "model", tmp_path / "out", ["normal"])
    (part / "notes" / "secret.json").unlink()
    (part / "notes" / "door").symlink_to(kinds / "clip")
    with pytest.raises(CheckpointError, match="door' leads through a link"):
        detach_checkpoint(tmp_path / "model", tmp_path / "out", ["normal"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["../elsewhere", "./sub/../../elsewhere", "./linked"])
@pytest.mark.parametrize("what", ["language", "expert", "clip"])
def test_relative_sources_lie_in_their_folder(what, place, kinds, tmp_path):
    make = {"language": with_language, "expert": with_expert, "clip": with_clip}[what]
    part = make(kinds, tmp_path / "model")
    part.rename(tmp_path / "elsewhere")
    (tmp_path / "model" / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("config.json", "tove_llava.json"):
        file = tmp_path / "model" / name
        file.write_text(file.read_text().replace(f"hf:./{part.name}", f"hf:{place}"))
    with pytest.raises(CheckpointError, match="leads (out of|through a link)"):
        tove_llava.load_model(tmp_path / "model")


@pytest.mark.parametrize("source", ["hf:../x", "timm:../x", "timm:local-dir:../x", "open_clip:../x", "kornia:../x.pth",
                                    "gguf:../x.gguf", "random:hf:../x"])  # fmt: skip
def test_no_scheme_leaves_a_checkpoint(source, tmp_path):
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        Source.parse(source).resolve(tmp_path)
    assert str(Source.parse(source.replace("../", "./")).resolve(tmp_path).path).startswith(str(tmp_path))


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("config.json", {"transformers_weights": "../model.safetensors"}, "leads out of"),
        ("config.json", {"attn_implementation": "someone/kernel"}, "code of the hub"),
        ("config.json", {"text_config": {"_attn_implementation": "someone/kernel@main"}}, "code of the hub"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}, "leads out of"),
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_name_or_path": "/x"}}, "audio tokenizer"),
    ],
)
def test_settings_that_read_elsewhere_are_refused(file, change, words, kinds, tmp_path):
    folder = copied(kinds / "full", tmp_path / "model")
    edit(folder / file, lambda content: content.update(change))
    for opened in (tove_llava.load_model, tove_llava.ToveLlavaForConditionalGeneration.from_pretrained):
        with pytest.raises(CheckpointError, match=words):
            opened(folder)


def test_a_damaged_file_is_left_to_its_reader(tmp_path):
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text("{")
    check_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1, "b": null}}')
    check_folder(tmp_path)


def test_other_things_that_a_processor_reads_lie_in_its_folder(tmp_path):
    (folder := tmp_path / "model").mkdir()
    (tmp_path / "templates").mkdir()
    (folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    with pytest.raises(CheckpointError, match="additional_chat_templates' leads through a link"):
        check_folder(folder)
    (folder / "additional_chat_templates").unlink()
    edit(folder / "audio_tokenizer_config.json", lambda c: c.update(audio_tokenizer_name_or_path="/x"))
    with pytest.raises(CheckpointError, match="audio tokenizer"):
        check_folder(folder)


def test_plugins_are_named_in_their_folder(kinds, tmp_path):
    entry = {"name": "../../evil.py", "version": "0", "file": True, "parts": {"fusion": ["evil"]}}
    folder = edit_manifest(copied(kinds / "lora", tmp_path / "model"), plugins=[entry])
    with pytest.raises(CheckpointError, match="leads out of"):
        tove_llava.load_model(folder)


@pytest.mark.parametrize(
    "key, change",
    [
        ("dinov2", lambda c: c.update(architecture="local-dir:/elsewhere")),
        ("dinov2", lambda c: c.update(architecture="hf-hub:someone/model")),
        ("dinov2", lambda c: c["model_args"].update(checkpoint_path="/elsewhere/x.bin")),
        ("eva-open_clip", lambda c: c["model_cfg"]["text_cfg"].update(hf_model_name="/elsewhere")),
        ("eva-open_clip", lambda c: c["model_cfg"]["vision_cfg"].update(timm_model_name="local-dir:/elsewhere")),
    ],
)
def test_experts_of_libraries_read_only_their_folder(key, change, tmp_path):
    spec = CASES[key].spec(tmp_path)
    [file] = [tmp_path / name for name in ("config.json", "open_clip_config.json") if (tmp_path / name).is_file()]
    edit(file, change)
    with pytest.raises(ToveError, match="no model of timm|no part of an architecture|text encoder elsewhere"):
        build_expert(spec).load()


def test_a_timm_folder_cannot_name_other_weights(tmp_path):
    spec = CASES["dinov2"].spec(tmp_path)
    good = build_expert(spec)
    good.load()
    elsewhere = {"source": "hf-hub", "hf_hub_id": "someone/model", "file": "/elsewhere", "url": "https://elsewhere"}
    edit(tmp_path / "config.json", lambda content: content["pretrained_cfg"].update(elsewhere, custom_load=True))
    again = build_expert(spec)
    again.load()
    for a, b in zip(good.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)


# -- pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["language", "expert", "clip", "full", "llava-hf"])
def test_pickles_are_no_source(what, kinds, world, tmp_path):
    folder = tmp_path / "model"
    makes = {"language": with_language, "expert": with_expert, "clip": with_clip, "full": whole("full")}
    part = makes[what](kinds, folder) if what in makes else copied(world.hf, folder)
    [file] = part.glob("*.safetensors")
    torch.save(load_file(file), part / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        tove_llava.load_model(folder, **({"keep_stock": True} if what == "llava-hf" else {}))


@pytest.mark.parametrize("key", ["dinov2", "eva-open_clip", "depth-segformer"])
def test_an_experts_pickle_is_refused(key, tmp_path):
    spec = CASES[key].spec(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    torch.save(load_file(file), tmp_path / file.name.replace(".safetensors", ".bin"))
    file.unlink()
    with pytest.raises(CheckpointError, match="Convert them to safetensors"):
        build_expert(spec).load()
