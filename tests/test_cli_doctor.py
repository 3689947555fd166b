"""The doctor: packages, bundled weights, memory and programs of this machine."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tove_llava import cli
from tove_llava.doctor import machine, packages, weights
from tove_llava.doctor.machine import available_memory


def make_part(root, name="clip"):
    (root / name).mkdir(parents=True)
    file = root / name / "model.safetensors"
    save_file({"weight": torch.arange(12.0)}, file)
    return file


def test_whole_weights_are_whole_and_absent_ones_are_reported(tmp_path):
    make_part(tmp_path)
    (finding,) = weights.bundled_weights(tmp_path)
    assert finding.name == "clip" and finding.state.startswith("whole") and not finding.remedy
    (finding,) = weights.bundled_weights(tmp_path / "none")
    assert finding.remedy and finding.required


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "bytes where its header says"),
        (lambda data: data[:20], "cut off in its header"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file"),
        (lambda data: b"", "not a safetensors file"),
        (lambda data: (2).to_bytes(8, "little") + b"{[", "not a safetensors file"),
    ],
)
def test_damaged_weights_are_found_and_the_remedy_named(tmp_path, damage, words):
    file = make_part(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    (finding,) = weights.bundled_weights(tmp_path)
    assert words in finding.state and "git checkout" in finding.remedy and finding.required


@pytest.mark.parametrize(
    ("versions", "code", "said"),
    [
        ({}, 0, '"torch"'),
        ({"gradio": None}, 0, "gradio (optional): pip install 'tove-llava[demo]'"),
        ({"transformers": "5.17.1"}, 1, "5.18 or newer is needed"),
        ({"sentencepiece": "0.2.3", "protobuf": "6.33.1"}, 1, "protobuf>=7.36"),
        ({"sentencepiece": "0.2.0", "protobuf": "6.33.1"}, 0, "protobuf"),
    ],
)
def test_the_exit_code_follows_the_required_packages(monkeypatch, capsys, versions, code, said):
    real = packages.installed_version
    monkeypatch.setattr(weights, "bundled_weights", lambda: [])
    monkeypatch.setattr(packages, "installed_version", lambda name: versions.get(name, real(name)))
    assert cli.main(["doctor", "--preset", "none", *([] if versions else ["--json"])]) == code
    text = capsys.readouterr().out
    assert said in text
    if not versions:
        names = {finding["name"] for finding in json.loads(text)}
        assert {"torch", "transformers", "deepspeed", "java", "chromium", "CPU", "memory", "disk"} <= names


@pytest.mark.parametrize(("limit", "expected"), [(None, 8000 * 1024), ("max", 8000 * 1024), (5000, 2500)])
def test_free_memory_is_within_the_containers_limit(tmp_path, limit, expected):
    group = tmp_path / "sys" / "fs" / "cgroup"
    files = {tmp_path / "proc" / "meminfo": "MemTotal:       99999 kB\nMemAvailable:   8000 kB\n"}
    if limit is not None:
        files |= {group / "memory.max": f"{limit}\n", group / "memory.current": "3000\n"}
        files[group / "memory.stat"] = "anon 5\ninactive_file 500\n"
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert available_memory(tmp_path) == expected


@pytest.mark.parametrize("name", ["java", "chromium"])
def test_programs_say_what_they_are_for(monkeypatch, name):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    (finding,) = [finding for finding in machine.programs() if finding.name == name]
    assert "not found; for" in finding.state and "apt-get install" in finding.remedy and not finding.required
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/bin/false")  # a java without an answer
    findings = {finding.name: finding for finding in machine.programs()}
    assert "does not run" in findings["java"].state and findings["java"].remedy
