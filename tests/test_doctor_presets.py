"""The doctor's verdicts on presets: sources, memory and disk, all machines."""

import json
import sys

import pytest
from huggingface_hub import constants
from train_parts import ROOT, write_parts

from tove_llava import cli
from tove_llava.core.text import GIB
from tove_llava.doctor.machine import Machine
from tove_llava.doctor.preset_sources import missing_from_cache, preset_sources
from tove_llava.doctor.presets import judge, judge_answering, preset_findings
from tove_llava.experts import availability
from tove_llava.presets import load_preset
from tove_llava.train.shapes import stage_shape

BIG = {"devices": 8, "device": 79, "host": 1000}


def machine(devices=0, device=0, host=16, disk=500, cores=2, tf32=True):
    return Machine(devices, device * GIB, host * GIB, disk * GIB, cores, tf32 and devices > 0)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(availability.constants, "HF_HUB_OFFLINE", True)


def verdict(name, stage, where, **arguments):
    preset = load_preset(name)
    return judge(preset, stage, stage_shape(preset, stage), where, **arguments)


def test_the_quickstarts_machine_runs_tiny():
    for stage in load_preset("tiny").stages:
        found = verdict("tiny", stage, machine(host=4))
        assert not found.reasons and not found.advice and found.place == "on each of 2 processes"
        assert 1 < found.memory.total / GIB < 2


@pytest.mark.parametrize("stage", ["pretrain", "finetune_lora", "finetune"])
def test_llavas_own_machine_runs_the_7b_recipe_as_it_is(stage):
    found = verdict("vicuna-7b", stage, machine(**BIG, cores=64))
    assert not found.reasons and not found.advice


def test_captions_are_short():
    found = verdict("vicuna-13b", "pretrain", machine(devices=8, device=60, host=1000))
    assert not found.reasons and found.advice == "while captions have at most 128 tokens"
    assert found.memory.total <= 60 * GIB


def test_settings_that_fit_are_named_and_do_fit():
    for gib, advice in {
        23: "with --per_device_train_batch_size 1 --gradient_accumulation_steps 16",
        11: "with DEEPSPEED_CONFIG=zero3_offload --per_device_train_batch_size",
    }.items():
        found = verdict("vicuna-7b", "finetune_lora", machine(devices=1, device=gib, host=64))
        assert found.advice.startswith(advice) and not found.reasons and found.memory.total <= gib * GIB


@pytest.mark.parametrize(
    ("stage", "there", "more", "reason"),
    [
        ("finetune", {"devices": 1, "device": 11, "host": 64}, {}, "11.0 GiB are free"),
        ("finetune_lora", {**BIG, "host": 100}, {}, "128 GiB of host memory, and 100 GiB are free"),
        ("finetune", {**BIG, "disk": 100}, {}, "up to 189 GiB of disk, and 100 GiB are free"),
        ("pretrain", BIG, {"missing": ("no CLIP",)}, "no CLIP"),
        ("pretrain", {**BIG, "disk": 10}, {"download": 16 * GIB}, "of disk"),
        ("pretrain", {"host": 900}, {}, "it needs CUDA GPUs"),
        ("pretrain", {**BIG, "device": 31, "tf32": False}, {}, "it needs GPUs with TF32 and bfloat16"),
    ],
)
def test_what_is_short_is_named(stage, there, more, reason):
    (found,) = verdict("vicuna-7b", stage, machine(**there), **more).reasons
    assert reason in found


def test_answering():
    preset = load_preset("vicuna-7b")
    shape = stage_shape(preset, "pretrain")
    assert not judge_answering(preset, shape, machine(devices=1, device=23)).reasons
    assert judge_answering(preset, shape, machine(devices=1, device=11)).reasons == ("11.0 GiB are free",)
    assert not judge_answering(preset, shape, machine(host=20)).reasons


# --- sources ----------------------------------------------------------------------------------------------------------


def test_bundled_and_local_sources_resolve(tmp_path):
    states = preset_sources(load_preset("tiny"))
    assert {state.key for state in states} >= {"vision.clip", "vision.experts.depth.source", "language.source"}
    assert all(state.resolves and state.here and not state.remedy for state in states)
    write_parts(tmp_path)
    assert all(state.here for state in preset_sources(load_preset(str(tmp_path / "preset.yaml"))))


def test_what_does_not_resolve_says_what_to_do(tmp_path):
    overrides = [
        f"language.source=hf:{tmp_path / 'absent'}",
        "vision.clip=hf:nobody/clip",
        "vision.experts=[{name: dinov2, source: 'timm:vit_large_patch14_dinov2.lvd142m', image_size: 98}]",
        "language.tokenizer=gguf:not_installed_anywhere",
    ]
    states = {state.key: state for state in preset_sources(load_preset("tiny", overrides))}
    assert not any(state.resolves for state in states.values())
    assert "does not exist" in states["language.source"].note
    assert "HF_HUB_OFFLINE" in states["vision.clip"].note
    assert "--set vision.clip=hf:FOLDER" in states["vision.clip"].remedy
    assert "vision.experts.dinov2.source=timm:./FOLDER" in states["vision.experts.dinov2.source"].remedy
    assert states["language.tokenizer"].remedy == "pip install --no-deps not_installed_anywhere"


def test_the_hubs_cache_is_looked_through_for_missing_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--llm"
    shards = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    index = json.dumps({"weight_map": shards})
    files = {"model.safetensors.index.json": index, "model-1-of-2.safetensors": "", "../../refs/main": "abc"}
    snapshot = repository / "snapshots" / "abc"
    for folder in (snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    for name, text in files.items():
        (snapshot / name).write_text(text)
    preset = load_preset("tiny", ["language.source=hf:somebody/llm"])
    assert missing_from_cache("nobody/llm", None) is None and missing_from_cache("somebody/llm", None) == 1
    state = preset_sources(preset)[-1]
    assert not state.resolves and "1 of its files are missing in the cache" in state.note
    (snapshot / "model-2-of-2.safetensors").write_bytes(b"")
    assert missing_from_cache("somebody/llm", None) == 0
    state = preset_sources(preset)[-1]
    assert state.here and state.note == "in the cache"


# --- the report -------------------------------------------------------------------------------------------------------


def test_findings_for_programs_and_people():
    findings = {finding.name: finding for finding in preset_findings(["tiny"], machine())}
    details = findings["pretrain"].details
    assert details["runs"] and details["bytes_per_device"]["total"] > details["bytes_per_device"]["weights"] > 0
    assert findings["pretrain"].state.startswith("runs here: needs 1.")
    assert findings["language.source"].details == {"source": "bundled:llm", "resolves": True, "here": True}
    json.dumps([vars(finding) for finding in findings.values()])


def test_a_stage_whose_package_is_missing_does_not_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # cannot be imported
    findings = {finding.name: finding for finding in preset_findings(["tiny"], machine())}
    assert "does not run here: the Python package peft is not installed" in findings["finetune_lora"].state
    assert findings["pretrain"].details["runs"]


def test_a_wrong_preset_is_a_finding(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: tiny\nvision: {top_k: two}\n")
    (finding,) = preset_findings([str(tmp_path / "mine.yaml")], machine())
    assert "expected int" in finding.state and finding.remedy


def test_through_the_command(capsys):
    assert cli.main(["doctor", "--json", "--preset", "vicuna-7b"]) == 0
    findings = json.loads(capsys.readouterr().out)
    stages = {f["name"]: f for f in findings if f["group"] == "preset vicuna-7b"}
    assert {"pretrain", "finetune_lora", "finetune", "merge", "chat", "vision.clip", "language.source"} <= set(stages)
    assert stages["pretrain"]["details"]["runs"] is False and stages["pretrain"]["details"]["reasons"]
    assert cli.main(["doctor", "--preset", "tiny", "--preset", "vicuna-7b"]) == 0
    out = capsys.readouterr().out
    assert "preset tiny:" in out and "needs CUDA GPUs" in out
    assert out.count("--set language.source=hf:FOLDER") == 1


def test_the_table_in_the_docs_is_what_the_function_gives(capsys):
    assert cli.main(["doctor", "--memory"]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "reference" / "memory.md").read_text()
