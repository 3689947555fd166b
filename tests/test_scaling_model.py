"""The model of docs/background/scaling.md: page, counts, and properties."""

import json
from dataclasses import replace

import pytest
import scaling_model as scaling
import torch
from benchmark_parts import ROOT
from scaling_model import Cluster, communication, measured_share, model_step, records
from step_parts import TrainingStep, make_batch
from work import Work

from tove_llava import build_model, load_preset
from tove_llava.train.shapes import stage_shape

SEVEN = load_preset("vicuna-7b")


@pytest.fixture(scope="module")
def shapes():
    return {stage: stage_shape(SEVEN, stage) for stage in scaling.STAGES}


def step(shapes, stage, level, cluster, **changes):
    return model_step(SEVEN, stage, shapes[stage], level, cluster, **{"flops": 2e13, "share": 0.4, **changes})


@pytest.mark.slow
def test_the_page_is_what_the_program_gives():
    assert scaling.PAGE.is_relative_to(ROOT) and scaling.generated() in scaling.PAGE.read_text(encoding="utf-8")


def test_operations_are_those_of_a_real_step():
    preset, stage = load_preset("tiny"), "finetune"
    work, model = Work(preset), build_model(preset)[0]
    batch = make_batch(model, 1, 100, torch.float32, 0)
    needed = TrainingStep(model, preset.stage(stage), torch.float32).needed_flops(batch)
    positions = batch["input_ids"].shape[1]
    # The head on the meta device has more rows, for the image's token; forward, and two backward passes.
    more = stage_shape(preset, stage).vocabulary - model.lm_head.weight.shape[0]
    expected = sum(needed.values()) + 3 * 2 * positions * model.lm_head.in_features * more
    counted = work.record(stage, positions=positions, scored=positions)
    assert counted == pytest.approx(expected, rel=1e-4)
    assert work.encoders == pytest.approx(needed["frozen_encoders"])
    without = work.record(stage, positions=positions, scored=positions, pictures=0)
    assert counted - without == pytest.approx(work.encoders + work.transfer)


@pytest.mark.parametrize("stage", scaling.STAGES)
def test_more_devices(shapes, stage):
    for level in scaling.LEVELS:
        one, eight, many = (step(shapes, stage, level, Cluster(n)) for n in (1, 8, 64))
        assert 0 == one.communication < eight.communication < many.communication
        assert one.memory > eight.memory > many.memory
        assert one.compute == pytest.approx(8 * eight.compute) == pytest.approx(64 * many.compute)
        assert one.efficiency == pytest.approx(1.0) and 1 > eight.efficiency > many.efficiency > 0
        assert one.samples < eight.samples < many.samples
        slow = step(shapes, stage, level, Cluster(64, adapters=1))
        assert slow.exposed > many.exposed and slow.compute == many.compute and slow.memory == many.memory
    for devices in (8, 64):  # ZeRO-3 sends more and holds less
        two, three = (step(shapes, stage, level, Cluster(devices)) for level in ("zero2", "zero3"))
        assert three.communication > two.communication and (three.batch > two.batch or three.memory < two.memory)


def test_volumes_by_hand(shapes):
    shape = replace(shapes["finetune"], registered=8 * 10**9, trained=10**9, hidden=10**5, layers=10)
    speed, hop = 0.8 * 450e9, 3e-6
    two, three = (communication(level, shape, Cluster(8), 3) for level in ("zero2", "zero3"))
    assert two.beside == pytest.approx(3 * (2e9 * 7 / 8 / speed + 7 * hop))
    assert two.alone == pytest.approx(2e9 * 7 / 8 / speed + 2 * 7 * hop)
    gather = 2 * 3 * (16e9 * 7 / 8 / speed + 10 * 7 * hop)
    assert three.alone == pytest.approx(gather / 10)
    assert three.beside == pytest.approx(two.beside + gather * 9 / 10)
    assert [Cluster(64, adapters=n).speed for n in (8, 1)] == pytest.approx([0.8 * 400e9, 0.8 * 50e9])


def test_fast_links_are_hidden_except_for_the_assumed_rest(shapes):
    sent = communication("zero3", shapes["pretrain"], Cluster(8), 1)
    calm = step(shapes, "pretrain", "zero3", Cluster(8))
    assert calm.exposed == pytest.approx(sent.alone + 0.2 * sent.beside)
    hurried = step(shapes, "pretrain", "zero3", Cluster(8), flops=1e9)
    assert hurried.exposed == pytest.approx(sent.alone + sent.beside - hurried.compute)
    assert [step(shapes, "finetune", "zero3", Cluster(devices)).fits for devices in (1, 8)] == [False, True]


def test_records_are_the_recipes():
    assert records(SEVEN, "pretrain").batch == 256 and records(SEVEN, "finetune_lora").batch == 128
    mix = records(SEVEN, "finetune")
    assert 200 < mix.text < 500 and 0 < mix.supervised < mix.text and mix.pictures == pytest.approx(624 / 664)


def test_a_measured_step_replaces_the_assumption(tmp_path):
    assert measured_share(tmp_path, "vicuna-13b", "pretrain") == (scaling.SHARE, "assumed")
    record = {"stages": {"pretrain": {"mfu": 0.5}, "finetune_lora": {"mfu": 0.41}, "finetune": {"mfu": None}}}
    (tmp_path / "train_step-vicuna-7b-cuda.json").write_text(json.dumps(record))
    assert measured_share(tmp_path, "vicuna-7b", "pretrain")[0] == 0.5
    said = "measured: finetune_lora in train_step-vicuna-7b-cuda.json"
    assert measured_share(tmp_path, "vicuna-13b", "finetune") == (0.41, said)
