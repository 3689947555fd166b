"""Freezing policies, LoRA targets, optimiser groups, and what stops a run."""

import json
import math
import re

import pytest
import torch
from data_helpers import save_odd_kinds
from PIL import Image
from sklearn.datasets import load_sample_images
from train_parts import flags, losses, weights, write_inputs

from tove_llava import build_model, load_preset
from tove_llava.core.errors import ConfigError, DataError, NonFiniteError
from tove_llava.llava import modeling
from tove_llava.presets import StagePreset
from tove_llava.train import step_checkpoints as checkpoints
from tove_llava.train.arguments import parse
from tove_llava.train.lines import describe
from tove_llava.train.meter import Meter
from tove_llava.train.run import main, run
from tove_llava.train.stages import freeze, lora_config, parameter_groups


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("stages"), captions=8, count=8)


def plain_model(root):
    return build_model(str(root / "preset.yaml"), load_backbones=False)[0]


def frozen_model(root, name):
    model, stage = plain_model(root), load_preset(str(root / "preset.yaml")).stage(name)
    return model, freeze(model, stage), stage


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("pretrain", ["projector", "tower"]),
        ("finetune_lora", ["projector", "tower", "lora"]),
        ("finetune", ["projector", "tower", "language model"]),
    ],
)
def test_what_trains_is_what_the_report_says(root, stage, parts):
    model, trainable, _ = frozen_model(root, stage)
    assert list(trainable.parts) == parts
    assert sorted(trainable.names()) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    report = trainable.report(model)
    for part in parts:
        assert re.search(rf"{part}\s+{sum(p.numel() for p in trainable.parts[part].values()):,}", report)


def test_lora_is_only_on_the_language_model(root):
    model, trainable, stage = frozen_model(root, "finetune_lora")
    names = list(trainable.parts["lora"])
    assert all(name.startswith("model.language_model.layers.") for name in names)
    targets = {name.split(".")[-4] for name in names}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 2 * 7 * 2  # layers, linear layers, A and B
    pattern = re.compile(lora_config(plain_model(root), stage).target_modules)
    tower = [name for name, _ in model.named_modules() if "vision_tower" in name or "projector" in name]
    assert tower and not any(pattern.fullmatch(name) for name in tower)
    assert not pattern.fullmatch("lm_head")
    # Only the start of the adapters' product is zero: the model is unchanged until a step is taken.
    assert all(not p.any() for name, p in trainable.parts["lora"].items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("policy", "message"),
    [("lora", "'lora' settings"), ("merge", "'merge' settings"), ("alignmnt", "Did you mean 'alignment'")],
)
def test_wrong_policies_are_named(root, policy, message):
    with pytest.raises(ConfigError, match=message):
        freeze(plain_model(root), StagePreset(train=policy, template="v1"))


def test_parts_with_their_own_rate_get_their_own_groups(root):
    _, trainable, _ = frozen_model(root, "finetune_lora")
    own = {"projector_learning_rate": 2e-5, "tower_learning_rate": 3e-5}
    groups = parameter_groups(trainable, learning_rate=2e-4, weight_decay=0.1, **own)
    rates = {(2e-5, 0.1), (2e-5, 0.0), (3e-5, 0.1), (3e-5, 0.0), (2e-4, 0.1)}
    assert {(g["lr"], g["weight_decay"]) for g in groups} == rates
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in trainable.parameters())
    decaying = [p.ndim > 1 for group in groups for p in group["params"] if group["weight_decay"]]
    named = [pair for part in trainable.parts.values() for pair in part.items()]
    assert all(decaying) and any(p.ndim == 1 and not name.endswith("bias") for name, p in named)


def test_all_rates_follow_the_schedule(root):
    options = ("--tower_learning_rate", "0.5", "--learning_rate", "0.0", "--max_steps", "2", "--optim", "sgd")
    assert main(flags(root, "pretrain", root / "rates", *options)) == 0
    start = dict(plain_model(root).named_parameters())
    moved = {name for name, value in weights(root / "rates").items() if not torch.equal(value, start[name])}
    assert moved and all("vision_tower.fusion" in name for name in moved)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_non_finite_loss_stops_before_the_step(root, capsys, monkeypatch, value):
    output = root / value
    honest, calls = modeling.supervised_loss, []

    def broken(*args):
        calls.append(1)
        return honest(*args) * (float(value) if len(calls) == 2 else 1)

    monkeypatch.setattr(modeling, "supervised_loss", broken)
    arguments = flags(root, "pretrain", output, "--save_strategy", "steps", "--save_steps", "1")
    with pytest.raises(NonFiniteError, match=r"step 2 on rank 0.*[Rr]ecord"):
        run(parse(arguments))
    assert [path.name for path in checkpoints.complete(output)] == ["checkpoint-1"]
    assert not (output / "tove_llava.json").exists()
    assert main(arguments) == 0  # the third call is whole again: the run resumes and ends


def test_both_stages_train_on_photographs_of_odd_kinds(root, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)  # 640 x 427
    save_odd_kinds(flower, photos)
    china.crop((0, 100, 640, 103)).save(photos / "strip.png")
    flower.crop((300, 0, 301, 427)).save(photos / "column.jpg")
    names = sorted(path.name for path in photos.iterdir())
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a photograph"}]
    records = [{"id": name, "image": name, "conversations": turns} for name in names]
    (tmp_path / "photos.json").write_text(json.dumps(records))
    more = ["--data_path", str(tmp_path / "photos.json"), "--image_folder", str(photos)]
    stage1, stage2 = tmp_path / "stage1", tmp_path / "stage2"
    assert main(flags(root, "pretrain", stage1, *more)) == 0
    assert main(flags(root, "finetune_lora", stage2, *more, "--pretrained", str(stage1))) == 0
    for folder in (stage1, stage2):
        found = [loss for (loss,) in losses(folder, "loss")]
        assert len(found) == len(names) / 4 and all(map(math.isfinite, found))


def test_bad_record_stops_before_anything_is_written(root, tmp_path):
    records = json.loads((root / "captions.json").read_text())
    records[3]["image"] = "missing.png"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    arguments = flags(root, "pretrain", tmp_path / "out", "--data_path", str(tmp_path / "bad.json"))
    with pytest.raises(DataError, match=r"missing\.png"):
        run(parse(arguments))
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 2


def test_meter_averages_over_steps_and_survives_a_checkpoint():
    meter, resumed = (Meter(["a", "b"], torch.device("cpu")) for _ in range(2))
    for lm in (2.0, 4.0):
        for name, value in {"lm_loss": torch.tensor(lm), "aux_loss": 1.0, "steps": 1}.items():
            meter.add(name, value)
        meter.add_routing(torch.tensor([[[0.25, 0.75]]]))
    resumed.restore(json.loads(json.dumps(meter.state())), rank=0)
    for read in (meter.read(0.5), resumed.read(0.5)):
        assert (read["lm_loss"], read["aux_loss"], read["loss"]) == (3.0, 1.0, 3.5)
        assert (read["gate/a"], read["gate/b"]) == (0.25, 0.75)
        assert read["gate/entropy"] == pytest.approx(0.5623, abs=1e-4)
    assert meter.read(0.5)["lm_loss"] == 0.0
    meter.add("lm_loss", float("inf"))  # JSON knows neither
    assert math.isnan(meter.read(0.5)["lm_loss"])


def test_meter_gives_the_share_of_time_spent_waiting_for_data(monkeypatch):
    clock = iter(range(0, 100, 5))  # 5 seconds between two looks
    monkeypatch.setattr("tove_llava.train.meter.time.perf_counter", lambda: next(clock))
    meter = Meter([], torch.device("cpu"))  # 0
    for _ in range(2):
        with meter.waiting():  # 5 to 10, 15 to 20
            pass
    assert meter.read(0.0)["data_wait"] == pytest.approx(10 / 25)
    assert meter.read(0.0)["data_wait"] == 0


def test_line_of_a_step_shows_what_a_person_wants_to_see():
    logs = {"loss": 1.5, "lm_loss": 1.4, "aux_loss": 0.2, "learning_rate": 1e-3, "gate/depth": 0.6, "data_wait": 0.05}
    assert describe(logs) == "loss 1.5000 (lm 1.4000), lr 1.00e-03"
    more = {"lm_loss": 1.5, "merge_loss": 0.1, "grad_norm": 2.0, "samples_per_second": 1234.5, "data_wait": 0.25}
    line = describe(logs | more)
    assert line == "loss 1.5000 (merge 0.1000), grad 2, lr 1.00e-03, 1,234.5 samples/s, 25% waiting for data"


@pytest.mark.parametrize(
    "flag, value",
    [
        ("per_device_train_batch_size", "0"), ("gradient_accumulation_steps", "-1"), ("learning_rate", "-1"),
        ("learning_rate", "nan"), ("weight_decay", "inf"), ("max_steps", "0"), ("max_steps", "-3"),
        ("num_train_epochs", "0"),
    ],
)  # fmt: skip
def test_numbers_that_train_nothing_or_fail_later_are_refused(root, tmp_path, flag, value, capsys):
    assert main(flags(root, "pretrain", tmp_path / "out", f"--{flag}", value)) == 2
    assert f"--{flag} must be" in capsys.readouterr().err and not (tmp_path / "out").exists()
