"""Smaller checkpoints equal the masked model; the curve; the latency option."""

import json
import re
import shutil
from unittest.mock import Mock

import pytest
import torch
from analysis_parts import EXPERTS, write_checkpoint, write_records
from answer_parts import make_answerer
from PIL import Image
from safetensors.torch import load_file, save_file
from stage_parts import edit_manifest, logits

from tove_llava import cli, load_model
from tove_llava.analysis import speed
from tove_llava.analysis.contributions import measure_contributions, read_ranking
from tove_llava.analysis.curve import detach_curve
from tove_llava.analysis.detach import detach_checkpoint
from tove_llava.analysis.samples import load_samples
from tove_llava.checkpoints.loading import trained_names
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.core.errors import CheckpointError, ConfigError, DataError


def masked_logits(folder, experts):
    model, _ = load_model(folder)
    whole = logits(model)
    model.tower.detach_experts(experts)
    masked = logits(model)
    assert not torch.equal(whole, masked)
    return masked


VARIANTS = {
    "soft": ([], ["extra"]),
    "two gone": ([], ["normal", "extra"]),
    "null slot": (["vision.null_slot=true"], ["segmentation"]),
    "top_k": (["vision.top_k=2", "vision.null_slot=true"], ["normal"]),
    "top_k takes all that are left": (["vision.top_k=2"], ["segmentation"]),
    "no noise": (["vision.noisy_gating=false"], ["normal"]),
    "top1": (["vision.fusion=top1"], ["extra"]),
    "add": (["vision.fusion=add"], ["segmentation"]),
    "replace": (["vision.fusion=replace"], ["normal"]),
    "all": ([], list(EXPERTS)),
}


@pytest.mark.parametrize(
    ("kind", "variant"),
    [("lora", "soft"), ("full", "soft"), ("full", "all"), *(("trained", name) for name in VARIANTS)],
)
def test_a_smaller_checkpoint_is_the_masked_model_without_the_experts_source(tmp_path, kind, variant):
    overrides, gone = VARIANTS[variant]
    folder = write_checkpoint(tmp_path, kind, *overrides)
    expected = masked_logits(folder, gone)
    report = detach_checkpoint(folder, tmp_path / "small", gone)
    for name in gone:
        shutil.rmtree(tmp_path / name)
    with pytest.raises(CheckpointError):
        load_model(folder)
    model, processor = load_model(tmp_path / "small")
    assert torch.equal(logits(model), expected)
    kept = [name for name in EXPERTS if name not in gone]
    assert model.tower.config.expert_names == kept == list(report.kept)
    assert report.removed == tuple(name for name in EXPERTS if name in gone)
    named = json.loads((tmp_path / "small" / "config.json").read_text())["vision_config"]["experts"]
    assert [entry["name"] for entry in named] == kept
    before, after = Manifest.read(folder), Manifest.read(tmp_path / "small")
    assert after.kind == kind and after.fingerprint != before.fingerprint
    assert {**vars(after), "fingerprint": ""} == {**vars(before), "fingerprint": ""}
    stored = {n for file in (tmp_path / "small").glob("*.safetensors") for n in load_file(file) if "tower" in n}
    assert stored == {n for n in trained_names(model) if "tower" in n}, "nothing of the removed experts is stored"
    assert (tmp_path / "small" / "tokenizer.json").exists() and processor.conversation_template == before.template
    assert ("plain CLIP" in str(report)) == (not kept) == (model.tower.config.fusion == "none")
    card = (tmp_path / "small" / "README.md").read_text()
    assert [name for name in EXPERTS if f"| expert {name} |" in card] == kept and "Not evaluated" in card
    assert not list(tmp_path.glob(".*part"))


def test_experts_masked_in_the_checkpoint_go_too(tmp_path):
    folder = write_checkpoint(tmp_path, "trained")
    expected = masked_logits(folder, ["normal", "extra"])
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["detached_experts"] = ["normal"]
    (folder / "config.json").write_text(json.dumps(config))
    report = detach_checkpoint(folder, tmp_path / "small", ["extra"])
    assert report.kept == ("segmentation",)
    assert torch.equal(logits(load_model(tmp_path / "small")[0]), expected)


def test_self_contained_folder_stays_so_and_loses_the_experts_files(tmp_path):
    folder = write_checkpoint(tmp_path, "lora", self_contained=True)
    expected = masked_logits(folder, ["extra"])
    detach_checkpoint(folder, tmp_path / "small", ["extra"])
    for part in ("clip", "normal", "segmentation", "extra", "llm", "model"):
        shutil.rmtree(tmp_path / part)
    experts = tmp_path / "small" / "backbones" / "experts"
    assert sorted(path.name for path in experts.iterdir()) == ["normal", "segmentation"]
    assert torch.equal(logits(load_model(tmp_path / "small")[0]), expected)


def test_shards_and_dtypes_are_kept(tmp_path):
    folder = write_checkpoint(tmp_path, "full")
    whole = load_file(folder / "model.safetensors")
    tower = {name: value.to(torch.bfloat16) for name, value in whole.items() if ".fusion." in name}
    others = {name: value for name, value in whole.items() if ".fusion." not in name}
    (folder / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": tower, "model-00002-of-00002.safetensors": others}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    edit_manifest(folder, fingerprint="")
    expected = masked_logits(folder, ["normal"])
    detach_checkpoint(folder, tmp_path / "small", ["normal"])
    assert torch.equal(logits(load_model(tmp_path / "small")[0]), expected)
    small, others = (load_file(tmp_path / "small" / name) for name in shards)
    assert {value.dtype for value in small.values()} == {torch.bfloat16}
    index, stored = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text()), {**small, **others}
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(x.numel() * x.element_size() for x in stored.values())


@pytest.mark.parametrize(
    ("overrides", "gone", "message"),
    [
        ([], ["radar"], "unknown expert.*radar.*normal, segmentation, extra"),
        (["vision.top_k=2"], ["normal", "extra"], "top_k=2, but 1 gate column"),
        (["vision.fusion=channel_concat"], ["normal"], "'channel_concat' does not add"),
        (["vision.fusion=sequence_append"], ["normal"], "'sequence_append' does not add"),
        (["vision.fusion=replace"], list(EXPERTS), "'replace' without normal, segmentation, extra is not what it is"),
        (["vision.fusion=none"], ["normal"], "no experts"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, overrides, gone, message):
    folder = write_checkpoint(tmp_path, "trained", *overrides)
    with pytest.raises(ConfigError, match=message):
        detach_checkpoint(folder, tmp_path / "small", gone)
    assert not (tmp_path / "small").exists() and not list(tmp_path.glob(".*part"))


def test_an_existing_folder_and_damaged_input_are_refused(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, "trained")
    (tmp_path / "small").mkdir()
    with pytest.raises(CheckpointError, match="small exists already"):
        detach_checkpoint(folder, tmp_path / "small", ["extra"])
    with pytest.raises(CheckpointError, match="not a folder"):
        detach_checkpoint(tmp_path / "nowhere", tmp_path / "x", ["extra"])
    with monkeypatch.context() as patch:
        patch.setattr("tove_llava.analysis.detach.save_file", Mock(side_effect=OSError("no space left")))
        with pytest.raises(CheckpointError, match=r"x could not be written \(no space left\)"):
            detach_checkpoint(folder, tmp_path / "x", ["extra"])
    file = folder / "trained.safetensors"
    save_file({n: v for n, v in load_file(file).items() if "gate.norm.bias" not in n}, file)
    with pytest.raises(CheckpointError, match="do not belong together.*gate.norm.bias"):
        detach_checkpoint(folder, tmp_path / "x", ["extra"])
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*part"))


# -- curve and latency -------------------------------------------------------------------------------------------------


def test_curve_goes_down_to_clip_and_times_what_is_left(tmp_path, monkeypatch):
    answerer = make_answerer(tmp_path / "parts")
    samples = load_samples(write_records(tmp_path / "data"), None, answerer, "nowhere")
    found = measure_contributions(answerer, samples)
    ran, hub = [], answerer.tower.frozen.hub
    condition = hub.condition
    monkeypatch.setattr(hub, "condition", lambda pixels, names: ran.append(len(names)) or condition(pixels, names))
    steps = detach_curve(answerer, samples, found.ranking)
    assert [step.removed for step in steps] == [None, *found.ranking]
    assert [len(step.experts) for step in steps] == [3, 2, 1, 0]
    assert steps[1].experts == tuple(n for n in ("depth", "edge", "normal") if n != found.ranking[0])
    first = found.overall.experts[found.ranking[0]]
    assert steps[0].loss == pytest.approx(found.overall.loss, rel=1e-6)
    assert steps[1].loss == pytest.approx(found.overall.loss + first.loss_change, rel=1e-6)
    assert steps[-1].loss == pytest.approx(found.overall.loss_without_experts, rel=1e-6)
    assert all(step.images_per_second > 0 for step in steps)
    assert ran[-3:] == [3, 2, 1], "in each timed round experts are skipped, and plain CLIP does not enter the hub"
    assert answerer.tower.config.detached_experts == []


def test_latency_drops_the_least_contributing_until_it_fits(tmp_path, monkeypatch):
    tower = make_answerer(tmp_path).tower
    ranking = ["edge", "depth", "normal"]
    assert speed.fit_latency(tower, ranking, 1e9, rounds=1).removed == ()
    monkeypatch.setattr(speed, "seconds", lambda tower, subsets, **_: [(9 - 2 * len(s)) / 1000 for s in subsets])
    assert speed.fit_latency(tower, ranking, 7.5) == speed.Fit(("edge",), 7, 9)
    assert speed.fit_latency(tower, ranking, 3) == speed.Fit(("edge", "depth", "normal"), 3, 9)
    with pytest.raises(ConfigError, match="takes 9.00 ms .* plain CLIP still 3.00 ms"):
        speed.fit_latency(tower, ranking, 2.9)


def test_a_ranking_of_another_model_is_refused(tmp_path):
    file, other, gone = (tmp_path / f"{name}.json" for name in ("contributions", "other", "gone"))
    file.write_text(json.dumps({"kind": "contributions", "ranking_least_first": ["a", "b"], "fingerprint": "x"}))
    other.write_text("{}")
    assert read_ranking(file, ["b", "a"], "x") == ["a", "b"]
    for error, words, arguments in [
        (ConfigError, "another model", (file, ["a", "b"], "y")),
        (ConfigError, "measured with the experts a, b", (file, ["a"], "x")),
        (DataError, "is not what", (other, ["a"], "x")),
        (DataError, "there is no file", (gone, ["a"], "x")),
    ]:
        with pytest.raises(error, match=words):
            read_ranking(*arguments)


def test_commands(tmp_path, capsys):
    folder, data = write_checkpoint(tmp_path, "lora"), write_records(tmp_path / "data")
    common = ["detach", "--model", str(folder), "--device", "cpu"]

    def run(*flags):
        code = cli.main([*common, *map(str, flags)])
        output = capsys.readouterr()
        return code, output.out if code == 0 else output.err

    code, text = run("--curve", "--data", data, "--out", tmp_path / "curve", "--batch-size", 4)
    assert code == 0 and "none (plain CLIP)" in text
    record = json.loads((tmp_path / "curve" / "detach_curve.json").read_text())
    assert [len(step["experts"]) for step in record["steps"]] == [3, 2, 1, 0]
    with Image.open(tmp_path / "curve" / "detach_curve.png") as plot:
        assert min(plot.size) > 200
    measured = tmp_path / "curve" / "contributions.json"
    ranking = json.loads(measured.read_text())["ranking_least_first"]
    assert [step["removed"] for step in record["steps"][1:]] == ranking

    code, text = run("--keep", 1, "--contributions", measured, "--out", tmp_path / "one", "--json")
    assert code == 0 and json.loads(text)["kept"] == ranking[-1:]
    assert load_model(tmp_path / "one")[0].tower.config.expert_names == ranking[-1:]
    code, text = run("--max-latency-ms", 1e9, "--contributions", measured, "--out", tmp_path / "fast")
    assert code == 0 and "removed nothing" in text
    assert re.search(r"; tower (\d+\.\d\d) ms for one image, with all experts \1 ms$", text.strip())
    code, text = run("--max-latency-ms", 1e9, "--contributions", measured, "--out", tmp_path / "again", "--json")
    assert 0 < json.loads(text)["latency_ms"] == json.loads(text)["latency_ms_whole"]
    code, text = run("--experts", "extra, normal", "--out", tmp_path / "named")
    assert code == 0 and "left: segmentation" in text

    for flags, message in [
        (["--max-latency-ms", 1e-6, "--contributions", measured, "--out", tmp_path / "x"], "plain CLIP still"),
        (["--keep", 4, "--contributions", measured, "--out", tmp_path / "x"], "this model has 3 experts"),
        (["--keep", -1, "--contributions", measured, "--out", tmp_path / "x"], "--keep must be at least 0"),
        (["--keep", 1, "--out", tmp_path / "x"], "give --data"),
        (["--curve", "--out", tmp_path / "x"], "--curve needs --data"),
        (["--experts", ",", "--out", tmp_path / "x"], "--experts names no expert"),
        (["--experts", "extra", "--out", tmp_path / "one"], "exists already"),
    ]:
        code, text = run(*flags)
        assert code == 2 and message in text, flags
    assert not (tmp_path / "x").exists()
