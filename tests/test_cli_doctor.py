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


def test_whole_weights_are_whole(tmp_path):
    make_part(tmp_path)
    (finding,) = weights.bundled_weights(tmp_path)
    assert finding.name == "clip" and finding.state.startswith("whole") and not finding.remedy


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


def test_absent_weights_are_reported(tmp_path):
    (finding,) = weights.bundled_weights(tmp_path / "none")
    assert finding.remedy and finding.required


def test_report_names_each_package_and_the_exit_code_follows_the_required_ones(monkeypatch, capsys):
    monkeypatch.setattr(weights, "bundled_weights", lambda: [])
    assert cli.main(["doctor", "--json", "--preset", "none"]) == 0
    names = {finding["name"] for finding in json.loads(capsys.readouterr().out)}
    assert {"torch", "transformers", "deepspeed", "java", "chromium", "CPU", "memory", "disk"} <= names

    real = packages.installed_version
    monkeypatch.setattr(packages, "installed_version", lambda name: None if name == "gradio" else real(name))
    assert cli.main(["doctor", "--preset", "none"]) == 0
    assert "gradio (optional): pip install 'tove-llava[demo]'" in capsys.readouterr().out

    monkeypatch.setattr(packages, "installed_version", lambda name: "5.17.1" if name == "transformers" else real(name))
    assert cli.main(["doctor", "--preset", "none"]) == 1
    assert "5.18 or newer is needed" in capsys.readouterr().out


def test_protobuf_that_sentencepiece_cannot_use_is_found(monkeypatch, capsys):
    monkeypatch.setattr(weights, "bundled_weights", lambda: [])
    versions = {"sentencepiece": "0.2.3", "protobuf": "6.33.1"}
    real = packages.installed_version
    monkeypatch.setattr(packages, "installed_version", lambda name: versions.get(name) or real(name))
    assert cli.main(["doctor", "--preset", "none"]) == 1
    assert "protobuf>=7.36" in capsys.readouterr().out
    versions["sentencepiece"] = "0.2.0"
    assert cli.main(["doctor", "--preset", "none"]) == 0


def meminfo(root, available, limit=None, used=0, inactive=0):
    """As Linux shows a container's memory."""
    (root / "proc").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal:       99999 kB\nMemAvailable:   {available} kB\n")
    if limit is not None:
        group = root / "sys" / "fs" / "cgroup"
        group.mkdir(parents=True)
        for name, value in {"memory.max": limit, "memory.current": used}.items():
            (group / name).write_text(f"{value}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [({}, 8000 * 1024), ({"limit": "max"}, 8000 * 1024), ({"limit": 5000, "used": 3000, "inactive": 500}, 2500)],
)
def test_free_memory_is_within_the_containers_limit(tmp_path, limit, expected):
    meminfo(tmp_path, 8000, **limit)
    assert available_memory(tmp_path) == expected


@pytest.mark.parametrize("name", ["java", "chromium"])
def test_programs_say_what_they_are_for(monkeypatch, name):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    (finding,) = [finding for finding in machine.programs() if finding.name == name]
    assert "not found; for" in finding.state and "apt-get install" in finding.remedy and not finding.required
    java_without_answer = "/bin/false"
    monkeypatch.setattr(machine.shutil, "which", lambda name: java_without_answer)
    findings = {finding.name: finding for finding in machine.programs()}
    assert "does not run" in findings["java"].state and findings["java"].remedy
