"""`train --print-config` shows what a run will do, as a preset that does it."""

import json
import re
from dataclasses import replace

import pytest
import yaml
from train_parts import flags, write_inputs

from tove_llava.cli import main as cli
from tove_llava.core.errors import ConfigError
from tove_llava.llava.sizes import preset_sizes
from tove_llava.presets import load_preset
from tove_llava.train.arguments import parse
from tove_llava.train.memory import Run, training_memory
from tove_llava.train.plan import Records, record_operations
from tove_llava.train.run import main
from tove_llava.train.shapes import stage_shape


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("plan"), captions=19, count=19)


def shown(arguments, capsys):
    assert main([*arguments, "--print-config"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("pretrain", ["--set", "vision.top_k=1", "--report_to", "tensorboard", "--lr_scheduler_type", "linear"]),
        ("finetune_lora", ["--lora_r", "3", "--deepspeed", "zero3", "--gradient_accumulation_steps", "3"]),
        ("finetune_lora", ["--bits", "4", "--quant_type", "fp4", "--gradient_checkpointing", "True"]),
        ("merge", ["--merge_layers", "0", "1", "--merge_lora_r", "2", "--max_steps", "7", "--pretrained", "."]),
    ],
)
def test_shown_settings_are_a_preset_of_the_same_run(root, tmp_path, capsys, monkeypatch, stage, more):
    monkeypatch.setattr("tove_llava.train.plan._tokenizer", lambda run, preset: None)
    arguments = flags(root, stage, tmp_path / "out", *more)
    file = tmp_path / "shown.yaml"
    file.write_text(shown(arguments, capsys))
    further = more[more.index("--pretrained") :] if "--pretrained" in more else []
    again = flags(root, stage, tmp_path / "out", *further)
    again[1] = str(file)
    assert parse(again).record() == parse(arguments).record()
    assert list(yaml.safe_load(file.read_text())["stages"]) == [stage]


def test_plan_is_what_the_run_does(root, tmp_path, capsys):
    batches = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3", "--num_train_epochs", "1.5"]
    arguments = flags(root, "finetune_lora", tmp_path / "out", *batches)
    plan = shown(arguments, capsys)
    assert main(arguments) == 0
    steps = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["max_steps"]
    assert f"# steps: {steps} (epochs: 1.5, records: 19)" in plan and not (tmp_path / "out" / "checkpoint-1").exists()
    assert "# global batch: 6 records" in plan and "an estimate" in plan

    settings = parse(arguments)
    example = settings.stage
    memory = training_memory(settings.preset, "finetune_lora", stage_shape(settings.preset, "finetune_lora"),
                             Run(1, None, 2, example.model_max_length))  # fmt: skip
    assert f"# memory: about {memory.total / 2**30:.1f} GiB" in plan
    tokens, supervised = map(int, re.search(r"\((\d+) and (\d+) a record", plan).groups())
    assert 0 < supervised < tokens < example.model_max_length
    assert "--pretrained" not in plan and f"--output_dir {tmp_path / 'out'}" in plan


def test_plan_of_several_ranks(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = shown(flags(root, "finetune_lora", tmp_path / "out", "--per_device_train_batch_size", "2"), capsys)
    assert "# global batch: 4 records" in plan and "# steps: 5 (epochs: 1, records: 19)" in plan
    assert "tove-llava launch finetune_lora --gpus 2 --preset THIS.yaml" in plan and "--stage" not in plan


def test_plan_needs_no_data_but_right_settings(root, capsys):
    preset = ["--preset", str(root / "preset.yaml")]
    plan = shown([*preset, "--pretrained", "nowhere"], capsys)
    assert "give --data_path" in plan and "nowhere is not there yet" in plan
    assert cli(["train", *preset, "--print-config", "--stage", "pretrian"]) == 2
    assert "Did you mean 'pretrain'" in capsys.readouterr().err


def test_operations_are_those_of_the_benchmark_of_a_step():
    preset = load_preset("tiny")
    stage, shape, records = preset.stage("pretrain"), stage_shape(preset, "pretrain"), Records(1, 1, 1.0, 164, 128)
    sizes = preset_sizes(preset)
    counted = record_operations(sizes, stage, shape, records, cached=False)
    assert counted == pytest.approx(18.86e9 / 8, rel=0.1)  # benchmarks/results/train_step-tiny-cpu.md
    assert record_operations(sizes, stage, shape, records, cached=True) < 0.9 * counted
    text = replace(records, images=0.0)
    forward_and_backward = record_operations(sizes, stage, shape, text, cached=False)
    stage.checkpointing = "full"
    assert record_operations(sizes, stage, shape, text, cached=False) == pytest.approx(1.5 * forward_and_backward)


@pytest.mark.parametrize(
    ("name", "message"), [("wandb", "pip install wandb"), ("wandbb", "Did you mean 'wandb'"), ("tensorbord", "Known")]
)
def test_absent_or_unknown_report_is_refused_as_a_setting(root, tmp_path, monkeypatch, name, message):
    monkeypatch.setattr("tove_llava.train.argument_rules.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ConfigError, match=message):
        parse(flags(root, "pretrain", tmp_path, "--report_to", name))
