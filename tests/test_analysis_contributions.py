"""Contributions against a loop over all subsets, and against handwritten sums.

The loop runs the whole model for each subset.
"""

import json
from unittest.mock import Mock

import pytest
import torch
from analysis_parts import conversation, write_records
from answer_parts import make_answerer, make_model, make_scenes, save_model
from PIL import Image
from torch.nn import functional as F
from tower_parts import tower_config

from tove_llava import cli
from tove_llava.analysis import measure
from tove_llava.analysis.contributions import measure_contributions
from tove_llava.analysis.measure import image_statistics
from tove_llava.analysis.results import Contributions, ExpertContribution, Group
from tove_llava.analysis.samples import load_samples
from tove_llava.checkpoints.manifest import MANIFEST
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import encode_record, parse_record
from tove_llava.inference.generation import Answerer
from tove_llava.tower.embedding import resample_grid

NAMES = ["depth", "edge", "normal"]


@pytest.fixture
def answerer(tmp_path, monkeypatch):
    """A model whose answers depend on the image, and so on subsets."""
    made = make_answerer(tmp_path / "parts")

    def answer(prompts, features, max_new_tokens):
        assert len(features) == len(prompts) and max_new_tokens >= 16
        return ["YES." if float(seen[0].double().sum()) > 0 else "no" for seen in features]

    monkeypatch.setattr(made, "generate", answer)
    return made


@pytest.fixture
def data(tmp_path):
    return write_records(tmp_path / "data")


@torch.no_grad()
def naive(answerer, data, without):
    """Return (summed loss, tokens, right or None) of each image record separately."""
    rows = []
    answerer.tower.detach_experts(without)
    for index, raw in enumerate(json.loads(data.read_text())[:-1]):
        encoded = encode_record(parse_record(raw, index), answerer.tokenizer, "v1")
        ids, labels = [], []
        for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
            times = answerer.num_image_tokens if token == -200 else 1
            ids += [answerer.image_token_id if token == -200 else token] * times
            labels += [label] * times
        pixels = answerer.pixels(data.parent / "images" / raw["image"])[None]
        out = answerer.model(input_ids=torch.tensor([ids]), pixel_values=pixels, labels=torch.tensor([labels]))
        reply = raw["conversations"][1]["value"]
        (text,) = answerer.generate([[1]], answerer.features(pixels), 16)
        right = text.lower().strip(".") == reply.lower().strip(".") if len(reply.split()) <= 5 else None
        rows.append((out.loss.item() * encoded.num_supervised, encoded.num_supervised, right))
    answerer.tower.attach_experts(without)
    return rows


def summary(rows):
    marks = [mark for *_, mark in rows if mark is not None]
    return sum(r[0] for r in rows) / sum(r[1] for r in rows), sum(marks) / len(marks) if marks else None


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_same_as_running_the_whole_model_for_each_subset(answerer, data, batch_size, monkeypatch):
    encode, seen = answerer.tower.encode, []
    with monkeypatch.context() as patch:
        patch.setattr(answerer.tower, "encode", lambda pixels: seen.append(len(pixels)) or encode(pixels))
        found = measure_contributions(answerer, load_samples(data, None, answerer, "nowhere"), batch_size)
    assert sum(seen) == 4, "every image is encoded once"
    everything, nothing = naive(answerer, data, []), naive(answerer, data, NAMES)
    left_out = {name: naive(answerer, data, [name]) for name in NAMES}
    groups = [(found.overall, range(8))]
    groups += [(found.types[kind], range(start, 8, 3)) for start, kind in enumerate(("count", "colour", "shape"))]
    for group, rows in groups:
        loss, accuracy = summary([everything[i] for i in rows])
        assert group.loss == pytest.approx(loss, rel=1e-5) and group.accuracy == pytest.approx(accuracy)
        loss_none, accuracy_none = summary([nothing[i] for i in rows])
        assert group.loss_without_experts == pytest.approx(loss_none, rel=1e-5)
        assert group.accuracy_without_experts == pytest.approx(accuracy_none)
        assert group.tokens == sum(everything[i][1] for i in rows) and group.records == len(rows)
        for name, expert in group.experts.items():
            loss_without, accuracy_without = summary([left_out[name][i] for i in rows])
            assert expert.loss_change == pytest.approx(loss_without - loss, abs=2e-5)
            assert expert.accuracy_change == pytest.approx(accuracy_without - accuracy)
    assert found.overall.answers == 7, "the long reply is not counted"
    assert any(abs(e.loss_change) > 1e-3 for e in found.overall.experts.values()), "the experts matter here"
    assert any(e.accuracy_change for group, _ in groups for e in group.experts.values())


def test_features_are_kept_until_their_last_use_only(answerer, data, monkeypatch):
    kept, honest = [], measure._Store.release

    def release(self, batch):
        honest(self, batch)
        kept.append(len(self.known))

    monkeypatch.setattr(measure._Store, "release", release)
    measure_contributions(answerer, load_samples(data, None, answerer, "nowhere"), 2)
    assert max(kept) < 4 and kept[-1] == 0


def test_gate_weight_and_norm_share_by_hand(answerer, data):
    tower, files = answerer.tower, [data.parent / "images" / f"{i}.png" for i in range(4)]
    found = measure_contributions(answerer, load_samples(data, None, answerer, "nowhere"))
    features = tower.encode(torch.stack([answerer.pixels(file) for file in files]))
    fusion, base = tower.fusion, features.base
    with torch.no_grad():
        normed = F.layer_norm(base, base.shape[-1:], fusion.gate.norm.weight, fusion.gate.norm.bias)
        weights = (normed @ fusion.gate.score.weight.T).softmax(dim=-1)  # [B,N,K]
        parts = []
        for k, name in enumerate(NAMES):
            layer = fusion.embeddings[name]
            tokens = resample_grid(features.experts[name], 4).flatten(2).transpose(1, 2)
            hidden = F.gelu(layer.linear(layer.norm(tokens)))
            parts.append(weights[..., k, None] * (hidden @ fusion.output.weight.T))
        length = (base + sum(parts)).norm(dim=-1)
    for k, name in enumerate(NAMES):
        expert = found.overall.experts[name]
        assert expert.gate_weight == pytest.approx(weights[..., k].mean().item(), rel=1e-5)
        assert expert.norm_share == pytest.approx((parts[k].norm(dim=-1) / length).mean().item(), rel=1e-4)


def test_a_failed_expert_has_no_share_of_an_image(answerer):
    features = answerer.tower.encode(torch.zeros(2, 3, 32, 32))
    features.usable["edge"] = torch.tensor([True, False])
    weights, shares = image_statistics(answerer.tower, features)
    assert shares["edge"][1] == 0 == weights["edge"][1] and shares["edge"][0] > 0


def test_detached_experts_stay_detached_also_after_an_error(answerer, data, monkeypatch):
    samples = load_samples(data, None, answerer, "nowhere")
    answerer.tower.detach_experts("edge")
    found = measure_contributions(answerer, samples)
    assert list(found.overall.experts) == ["depth", "normal"]
    assert answerer.tower.config.detached_experts == ["edge"]
    monkeypatch.setattr(answerer, "generate", Mock(side_effect=RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        measure_contributions(answerer, samples)
    assert answerer.tower.config.detached_experts == ["edge"]


def test_ranking_is_by_loss_then_gate_weight():
    values = {"a": (0.5, 0.2), "b": (0.3, -0.1), "c": (0.2, 0.2), "d": (0.4, 0.1)}
    experts = {name: ExpertContribution(weight, 0.1, loss, None) for name, (weight, loss) in values.items()}
    found = Contributions(Group(1, 1, 1, 0, 1.0, None, 1.0, None, experts), {})
    assert found.ranking == ["b", "d", "c", "a"]


def test_playground_questions_are_read_as_records(answerer, tmp_path):
    rows = make_scenes(tmp_path / "scenes", images=2)
    from_questions = load_samples(tmp_path / "scenes" / "val_questions.jsonl", None, answerer, "nowhere")
    records = [
        {key: row[key] for key in ("image", "category")}
        | {"conversations": conversation(f"<image>\n{row['text']}", row["answer"])}
        for row in rows
    ]
    (tmp_path / "scenes" / "records.json").write_text(json.dumps(records))
    from_records = load_samples(tmp_path / "scenes" / "records.json", None, answerer, "nowhere")
    assert len(from_questions.rows) == 6
    for a, b in zip(from_questions.rows, from_records.rows, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
        assert (a.category, a.files, a.prompt, a.reply) == (b.category, b.files, b.prompt, b.reply)
        ids, image, answer = a.input_ids.tolist(), a.input_ids.tolist().index(-200), (a.labels >= 0).nonzero()[0]
        asked = ids[:image] + [answerer.image_token_id] * 16 + ids[image + 1 : answer]
        assert a.prompt == asked, "the question is what the loss is conditioned on"


def test_records_are_left_out_with_a_reason_and_limit_spreads(answerer, data):
    samples = load_samples(data, None, answerer, "nowhere")
    assert samples.total == 9 and samples.left_out == {"no image": 1}
    order = [row.files[0].name for row in samples.rows]
    assert order == sorted(order), "records of one image are neighbours"
    assert len(load_samples(data, None, answerer, "nowhere", limit=3).rows) == 3


@torch.no_grad()
def randomise(tower, scale):
    for parameter in tower.fusion.parameters():
        parameter.normal_(std=0.5)


@pytest.mark.parametrize("fusion", ["top1", "add", "replace", "channel_concat", "sequence_append", "none"])
def test_fusions_with_one_part_per_expert_are_measured_and_others_refused(tmp_path, data, fusion, monkeypatch):
    monkeypatch.setattr("answer_parts.tower_config", lambda folder: tower_config(folder, fusion=fusion))
    monkeypatch.setattr("answer_parts.open_output", randomise)
    answerer = Answerer(*make_model(tmp_path / "parts"))
    samples = load_samples(data, None, answerer, "nowhere")
    if fusion in ("top1", "add", "replace"):
        experts = measure_contributions(answerer, samples).overall.experts.values()
        assert all(e.norm_share > 0 and (e.gate_weight is None) == (fusion == "add") for e in experts)
        return
    with pytest.raises(ConfigError, match="no experts" if fusion == "none" else f"fusion '{fusion}' does not add"):
        measure_contributions(answerer, samples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved"))


def test_command_writes_table_json_and_plots(folder, data, tmp_path, capsys):
    arguments = ["contributions", "--model", str(folder), "--data", str(data), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--dtype", "float32"]) == 0
    table = capsys.readouterr().out
    assert "gate weight" in table and "loss change by type" in table and "8 records, 4 images" in table
    record = json.loads((tmp_path / "out" / "contributions.json").read_text())
    assert record["experts"] == NAMES and sorted(record["ranking_least_first"]) == NAMES
    assert record["fingerprint"] == json.loads((folder / MANIFEST).read_text())["fingerprint"]
    assert record["left_out"] == {"no image": 1} and record["versions"]["torch"] == torch.__version__
    assert record["command"] and set(record["types"]) == {"count", "colour", "shape"}
    for name in ("contributions.png", "contributions_by_type.png"):
        with Image.open(tmp_path / "out" / name) as plot:
            assert min(plot.size) > 200
    assert cli.main([*arguments, "--dtype", "float32", "--json", "--limit", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["overall"]["records"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1"),
        (["--data", "nowhere.json"], "there is no file nowhere.json"),
        (["--model", "nowhere"], "there is no model folder nowhere"),
        (["--image-folder", "nowhere"], "check --image-folder"),
    ],
)
def test_bad_input_is_named(folder, data, tmp_path, capsys, change, message):
    arguments = ["contributions", "--model", str(folder), "--data", str(data), "--out", str(tmp_path / "out"), *change]
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_records_are_named(answerer, data):
    first, *_, text = json.loads(data.read_text())
    for row, message in [
        ({**first, "category": 3}, "'category' must be a string"),
        ({**first, "image": "gone.png"}, "gone.png"),
        (text, "no record is left to measure"),
    ]:
        data.write_text(json.dumps([row]))
        with pytest.raises(DataError, match=message):
            load_samples(data, None, answerer, "nowhere")
