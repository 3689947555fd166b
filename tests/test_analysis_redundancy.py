"""`tove-llava redundancy`: CUR and Information Gap by masking each encoder."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from answer_parts import make_scenes, save_model
from tower_parts import make_tower, pixels

from tove_llava import cli
from tove_llava.analysis.redundancy import check_scored, masking_conditions, redundancy, redundancy_table
from tove_llava.core.errors import ConfigError
from tove_llava.eval.conditions import FULL, Condition, parse_conditions
from tove_llava.llava import ToveLlavaForConditionalGeneration

FUSIONS = ["tove", "top1", "add", "replace", "channel_concat", "sequence_append"]
MASKED = {name: Condition(f"without-{name}", "", detach=(name,)) for name in ("clip", "ocr", "depth")}


def results(full, **without):
    runs = {FULL.name: full, **{f"without-{name}": score for name, score in without.items()}}
    return {"b": {name: {"rows": {"overall": (score, 200)}} for name, score in runs.items()}}


def test_cur_is_the_lost_share_and_the_gap_is_largest_minus_smallest():
    row = redundancy(results(80.0, clip=20.0, ocr=76.0, depth=84.0), MASKED)["b"]["overall"]
    assert row["cur"] == pytest.approx({"clip": 0.75, "ocr": 0.05, "depth": -0.05})
    assert row["information_gap"] == pytest.approx(0.8)
    head, _, line = redundancy_table("b", {"overall": row}).splitlines()
    assert head.split() == ["b", "all", "(%)", "CUR", "clip", "CUR", "ocr", "CUR", "depth", "gap", "questions"]
    assert line.split() == ["overall", "80.0", "0.750", "0.050", "-0.050", "0.800", "200"]


def test_a_model_that_scores_zero_has_no_cur():
    row = redundancy(results(0.0, clip=0.0, ocr=1.0, depth=0.0), MASKED)["b"]["overall"]
    assert set(row["cur"].values()) == {None} and row["information_gap"] is None


def test_a_row_that_one_run_lacks_is_left_out():
    runs = results(80.0, clip=20.0, ocr=76.0, depth=84.0)
    for name in ("full", "without-clip"):
        runs["b"][name]["rows"]["colour"] = (50.0, 3)
    assert list(redundancy(runs, MASKED)["b"]) == ["overall"]


def test_a_benchmark_without_public_answers_is_refused(monkeypatch):
    hidden = SimpleNamespace(ground_truth=lambda root: None)
    monkeypatch.setattr("tove_llava.analysis.redundancy.find_data", lambda *_: [("hidden", hidden, "root")])
    with pytest.raises(ConfigError, match="'hidden' has no accuracy: its answers are not public"):
        check_scored("hidden", ["root"])


def test_only_the_named_encoders_are_masked(tmp_path):
    model = save_model(tmp_path)
    assert list(masking_conditions(model, ["edge", "clip", "edge"])) == ["edge", "clip"]


def test_a_benchmark_without_scores_is_named():
    empty = {"rows": {}, "unavailable": {"all": "no Java"}}
    with pytest.raises(ConfigError, match="'b' has no accuracy: no Java"):
        redundancy({"b": dict.fromkeys([FULL.name, *(f"without-{name}" for name in MASKED)], empty)}, MASKED)


class Model:
    def __init__(self, tower):
        self.base_model = self
        self.vision_tower = tower


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_every_encoder_of_every_fusion_can_be_masked(tmp_path, fusion):
    tower = make_tower(tmp_path, fusion=fusion)
    for parameter in tower.fusion.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    images = pixels()
    features = tower.encode(images)
    whole = tower(images).last_hidden_state
    for name in ["clip", *tower.config.expert_names]:
        with parse_conditions(None, detach=name)[0].applied(Model(tower)):
            masked = tower(images).last_hidden_state
        if name == "clip":
            base = tower.fuse(replace(features, base=torch.zeros_like(features.base))).last_hidden_state
            assert torch.equal(masked, base)
        elif fusion != "sequence_append":  # the same as an expert that failed for every image
            lost = {name: torch.zeros(len(images), dtype=torch.bool)}
            torch.testing.assert_close(masked, tower.fuse(replace(features, usable=lost)).last_hidden_state)
        else:
            assert masked.shape[1] < whole.shape[1]
        assert masked.shape != whole.shape or not torch.equal(masked, whole)
        assert torch.equal(tower(images).last_hidden_state, whole), "it comes back"
    with parse_conditions(None, detach="all,clip")[0].applied(Model(tower)):
        nothing = tower(images).last_hidden_state
    assert torch.equal(nothing[0], nothing[1]), "no encoder is left that tells the images apart"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_scenes(root)
    return root


def measure(model, data, out, *more, benchmark="scenes"):
    flags = ["--model", str(model), "--data-root", str(data), "--out", str(out), "--device", "cpu"]
    return cli.main(["redundancy", "--benchmark", benchmark, *flags, *more])


@pytest.mark.parametrize("vision", [{}, {"fusion": "channel_concat"}, {"fusion": "sequence_append"}])
def test_the_command_writes_table_json_and_plot_and_continues(tmp_path, data, capsys, monkeypatch, vision):
    model, out = save_model(tmp_path, **vision), tmp_path / "out"
    assert measure(model, data, out, "--limit", "6") == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["scenes", "all", "(%)"]
    record = json.loads((out / "redundancy.json").read_text())
    assert record["encoders"] == ["clip", "depth", "edge", "normal"]
    assert record["benchmarks"]["scenes"]["overall"]["questions"] == 6
    assert (out / "redundancy.png").read_bytes()[:4] == b"\x89PNG"
    answers = {folder.name: (folder / "answers.jsonl").read_text() for folder in (out / "scenes").iterdir()}
    assert set(answers) == {"full", *(f"without-{name}" for name in record["encoders"])}

    def no_more(*_, **__):
        raise AssertionError("the answers are there already")

    monkeypatch.setattr(ToveLlavaForConditionalGeneration, "forward", no_more)
    assert measure(model, data, out, "--limit", "6", "--json") == 0
    assert json.loads(capsys.readouterr().out) == record


def test_bad_input_is_named_and_nothing_is_written(tmp_path, data, capsys):
    model, out = save_model(tmp_path), tmp_path / "out"
    plain = save_model(tmp_path / "plain", fusion="none", names=())
    for folder, more, benchmark, words in [
        (model, ["--encoders", "depht"], "scenes", "no encoder 'depht' to mask; it has: clip, depth, edge, normal"),
        (plain, [], "scenes", "no attached experts"),
        (tmp_path / "no", [], "scenes", "no model folder"),
        (model, [], "sceens", "sceens"),
    ]:
        assert measure(folder, data, out, *more, benchmark=benchmark) == 2
        assert words in capsys.readouterr().err
    (data / "llava-bench-in-the-wild").mkdir()
    (data / "llava-bench-in-the-wild" / "questions.jsonl").write_text("{}\n")
    assert measure(model, data, out, benchmark="llava_bench") == 2
    assert "'llava_bench' is scored by a judge" in capsys.readouterr().err
    assert not out.exists()
