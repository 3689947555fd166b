import json

import pytest
import torch
from safetensors.torch import save_file

from tove_llava import cli
from tove_llava.cli import doctor


def make_part(root, name="clip"):
    (root / name).mkdir(parents=True)
    file = root / name / "model.safetensors"
    save_file({"weight": torch.arange(12.0)}, file)
    return file


def test_whole_weights_are_whole(tmp_path):
    make_part(tmp_path)
    (finding,) = doctor.bundled_weights(tmp_path)
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
    (finding,) = doctor.bundled_weights(tmp_path)
    assert words in finding.state and "git checkout" in finding.remedy and finding.required


def test_absent_weights_are_reported(tmp_path):
    (finding,) = doctor.bundled_weights(tmp_path / "none")
    assert finding.remedy and finding.required


def test_report_names_each_package_and_the_exit_code_follows_the_required_ones(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "bundled_weights", lambda: [])
    assert cli.main(["doctor", "--json"]) == 0
    names = {finding["name"] for finding in json.loads(capsys.readouterr().out)}
    assert {"torch", "transformers", "deepspeed", "java", "CPU"} <= names

    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "gradio" else real(name))
    assert cli.main(["doctor"]) == 0
    assert "gradio (optional): pip install 'tove-llava[demo]'" in capsys.readouterr().out

    monkeypatch.setattr(doctor, "installed_version", lambda name: "5.17.1" if name == "transformers" else real(name))
    assert cli.main(["doctor"]) == 1
    assert "5.18 or newer is needed" in capsys.readouterr().out


def test_protobuf_that_sentencepiece_cannot_use_is_found(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "bundled_weights", lambda: [])
    versions = {"sentencepiece": "0.2.3", "protobuf": "6.33.1"}
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: versions.get(name) or real(name))
    assert cli.main(["doctor"]) == 1
    assert "protobuf>=7.36" in capsys.readouterr().out
    versions["sentencepiece"] = "0.2.0"
    assert cli.main(["doctor"]) == 0
