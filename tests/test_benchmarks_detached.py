"""The benchmark of detached experts: its arithmetic, and one small run of it."""

import json
import sys

import pytest
import torch
from train_parts import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import detached
import summary
from detached import KINDS, furthest, step, written_tower
from tower_parts import make_tower, open_output, pixels

# CLIP 20, experts 30 and 40, fusion 10, of which each expert has 3.
SECONDS = {"whole": 100.0, "expert/a": 30.0, "expert/b": 40.0, "fusion/0": 10.0, "fusion/1": 7.0, "fusion/2": 4.0}


def test_shares_and_falls():
    exact = {f"{kind}/{count}": left for kind in KINDS for count, left in ((1, 67.0), (2, 24.0))}
    slow = {"masked/1": 83.5, "written/2": 100.0}  # half of the fall, and none
    medians = {"wall": SECONDS | exact, "cpu": SECONDS | exact | slow}
    steps = [step(medians, gone) for gone in (["a"], ["a", "b"])]
    assert [entry["removed"] for entry in steps] == [["a"], ["a", "b"]]
    assert [entry["wall"]["encoders"] for entry in steps] == pytest.approx([0.30, 0.70])
    assert [entry["wall"]["share"] for entry in steps] == pytest.approx([0.33, 0.76])
    assert [entry["wall"]["masked"]["fall"] for entry in steps] == pytest.approx([0.33, 0.76])
    assert [furthest(steps, kind) for kind in KINDS] == pytest.approx([0, 0])
    assert [furthest(steps, kind, "cpu") for kind in KINDS] == pytest.approx([0.5, 1])


def test_written_tower_has_what_is_left_and_computes_what_the_masked_one_does(tmp_path):
    tower = make_tower(tmp_path)
    open_output(tower)
    small = written_tower(tower, ["depth"])
    assert small.config.expert_names == ["edge", "normal"] and small.frozen.clip is tower.frozen.clip
    assert all(small.frozen.hub[name] is tower.frozen.hub[name] for name in small.config.expert_names)
    whole = tower(pixels()).last_hidden_state
    tower.detach_experts(["depth"])
    with torch.no_grad():
        assert torch.equal(small(pixels()).last_hidden_state, tower(pixels()).last_hidden_state)
    assert not torch.allclose(small(pixels()).last_hidden_state, whole, atol=1e-3)


def test_one_run(tmp_path, monkeypatch):
    flags = ["--device", "cpu", "--repeats", "2", "--warmup", "1", "--batch", "1", "--output", str(tmp_path)]
    assert detached.main(flags) == 0
    record = json.loads((tmp_path / "detached-tiny-cpu.json").read_text())
    order = ["depth", "normal", "edge", "segmentation"]
    assert [entry["removed"] for entry in record["steps"]] == [order[:count] for count in (1, 2, 3, 4)]
    seconds = {name: taken["wall_seconds"]["median"] for name, taken in record["samples"].items()}
    for count, entry in enumerate(record["steps"], 1):
        for kind in KINDS:
            fall = 1 - seconds[f"{kind}/{count}"] / seconds["whole"]
            assert entry["wall"][kind]["fall"] == pytest.approx(fall)
    shares = [entry["wall"]["share"] for entry in record["steps"]]
    assert seconds["masked/4"] < seconds["whole"] and seconds["written/4"] < seconds["whole"] and shares[-1] > shares[0]
    assert [goal["value"] for goal in record["targets"]] == [furthest(record["steps"], kind) for kind in KINDS]
    markdown = (tmp_path / "detached-tiny-cpu.md").read_text()
    assert "| depth, normal, edge, segmentation |" in markdown and markdown.count("at most 0.1") == 2
    assert summary.main(["--output", str(tmp_path)]) == 0  # targets.yaml lists them
    # A smaller tower that computes something else is no smaller tower.
    monkeypatch.setattr(detached, "written_tower", lambda tower, experts: written_tower(tower, tower.active_experts))
    with pytest.raises(AssertionError, match="not close"):
        detached.main(flags)


def test_a_preset_without_experts_is_told(tmp_path, capsys):
    nothing = ["--set", "vision.experts=[]", "--set", "vision.fusion=none"]
    assert detached.main(["--device", "cpu", "--output", str(tmp_path), *nothing]) == 2
    assert "no experts" in capsys.readouterr().err and not list(tmp_path.iterdir())
