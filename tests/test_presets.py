"""Presets are data: valid, open to overrides, and precise about mistakes."""

import re

import pytest
import yaml

from tove_llava.cli import main as cli
from tove_llava.core.errors import ConfigError
from tove_llava.llava.build import build_on_meta, parameter_table
from tove_llava.presets import load_preset, preset_names
from tove_llava.train import flags
from tove_llava.train.argument_rules import FIXED, REFUSED
from tove_llava.train.arguments import Parser, RunArguments, parse
from tove_llava.train.run import main
from tove_llava.train.stages import POLICIES


@pytest.mark.parametrize("name", sorted({"tiny", "small", "vicuna-7b", "vicuna-13b", *preset_names()}))
def test_every_preset_is_valid(name, tmp_path):
    preset = load_preset(name)
    assert preset.name == name and preset.description
    assert list(preset.stages) == ["pretrain", "finetune_lora", "finetune_qlora", "merge", "finetune"]
    (tmp_path / "records.json").write_text("[]")
    where = ["--data_path", str(tmp_path / "records.json"), "--image_folder", str(tmp_path), "--output_dir", "unused"]
    for stage in preset.stages:
        settings = parse(["--preset", name, "--stage", stage, *where])
        assert settings.stage.train in POLICIES and settings.training["learning_rate"] > 0


def test_unknown_preset_names_a_near_one():
    with pytest.raises(ConfigError, match="Did you mean 'vicuna-7b'"):
        load_preset("vicuna7b")
    with pytest.raises(ConfigError, match="does not exist"):
        load_preset("nowhere.yaml")


def test_shown_preset_is_the_same_preset(tmp_path, capsys):
    assert cli(["presets"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == preset_names()
    for name in preset_names():
        assert cli(["presets", "show", name, "--set", "vision.top_k=1"]) == 0
        (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
        assert load_preset(str(tmp_path / "shown.yaml")) == load_preset(name, ["vision.top_k=1"])
    assert cli(["presets", "show", "tiny", "--stage", "merge"]) == 0
    assert list(yaml.safe_load(capsys.readouterr().out)["stages"]) == ["merge"]
    assert cli(["presets", "show", "tiny", "--stage", "merg"]) == 2
    assert "Did you mean 'merge'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vision.topk=2", "Did you mean 'top_k'"),
        ("visoin.top_k=2", "Did you mean 'vision'"),
        ("vision.experts.dept.mode=map", "Did you mean 'depth'"),
        ("stages.pretrain.lorra.r=3", "Did you mean 'lora'"),
        ("stages.finetune_lora.lora.alpa=3", "Did you mean 'alpha'"),
        ("vision.router_aux_loss_coef=1e-3", "YAML wants a dot"),
        ("vision.top_k=two", "expected int"),
        ("vision.noisy_gating=1", "expected bool"),
        ("vision.top_k", "key.path=value"),
        ("vision.experts=[egde]", "no entry named 'egde'. Did you mean 'edge'"),
    ],
)
def test_wrong_overrides_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("tiny", [override])


def test_overrides_reach_nested_keys():
    overrides = ["vision.top_k=2", "vision.experts.depth.mode=features", "stages.finetune_lora.lora.r=7"]
    preset = load_preset("tiny", overrides)
    modes = {"depth": "features", "normal": "map", "edge": "map", "segmentation": "map"}
    assert {e["name"]: e["mode"] for e in preset.vision.experts} == modes
    assert preset.vision.top_k == 2 and preset.stage("finetune_lora").lora.r == 7
    kept = load_preset("tiny", ["vision.experts.edge.mode=features", "vision.experts=[edge, depth]"]).vision.experts
    assert [(expert["name"], expert["mode"]) for expert in kept] == [("edge", "features"), ("depth", "map")]


def test_files_extend_presets(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"extends": "tiny", "vision": {"top_k": 1}}))
    mine, tiny = load_preset(str(file)), load_preset("tiny")
    assert mine.name == "mine" and mine.vision.top_k == 1
    assert mine.vision.experts == tiny.vision.experts and mine.stages == tiny.stages
    file.write_text(yaml.safe_dump({"extends": str(file)}))
    with pytest.raises(ConfigError, match="extends itself"):
        load_preset(str(file))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_step", "3"], r"unknown flag '--max_step'\. Did you mean '--max_steps'"),
        (["--max_steps", "ten"], "max_steps"),
        (["--stage", "pretrian"], "Did you mean 'pretrain'"),
        (["--lora_r", "4"], "trains without LoRA"),
        ([], "--data_path"),
        (["--data_path", "no.json", "--image_folder", "."], "tove-llava scenes"),
        (["--set", "stages.pretrain.arguments.learning_rat=1.0"], "Did you mean 'learning_rate'"),
    ],
)
def test_wrong_flags_are_named(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse([*argv, "--output_dir", "unused"])


def test_help_fits_on_two_screens_and_has_every_flag_once(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    assert cli(["train", "--help"]) == 0
    page = capsys.readouterr().out
    assert len(page.splitlines()) <= 100
    listed = [line.split()[0] for line in page.splitlines() if line.startswith("  --")]
    switches = [f"--{name.replace('_', '-')}" for name in flags.SWITCHES]
    assert sorted(listed) == sorted([*switches, *(f"--{name}" for name in (*flags.own_flags(), *flags.COMMON))])
    assert main(["--help-all"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert len(listed) == len(set(listed))
    effective = Parser().flags() - FIXED.keys() - REFUSED.keys()
    assert effective == {flag[2:].replace("-", "_") for flag in listed} - {"help", "help_all", "plugin"}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr", "'--learning_rate'"),
        ("--LR", "'--learning_rate'"),
        ("--batch-size", "'--per_device_train_batch_size'"),
        ("--epochs", "'--num_train_epochs'"),
        ("--learning_rte", "'--learning_rate'"),
        ("--ddp_timeot", "'--ddp_timeout'"),
        ("--zyx", "--help-all"),
    ],
)
def test_flag_that_is_meant_is_named(typed, meant, capsys):
    for arguments in ([typed, "1"], [f"{typed}=1"]):
        assert cli(["train", *arguments]) == 2
        assert meant in capsys.readouterr().err


def test_what_people_type_is_no_flag_and_leads_to_one():
    known = Parser().flags()
    assert set(flags.COMMON) - {"set", "plugin"} <= known
    assert not known & set(flags.MEANT)
    assert {flag[2:].split()[0] for flag in flags.MEANT.values() if flag.startswith("--")} <= known
    assert Parser().given(["--learning-rate", "1"]) == Parser().given(["--learning_rate=1"])


def test_flags_override_the_preset_and_nothing_else(tmp_path):
    (tmp_path / "records.json").write_text("[]")
    common = ["--data_path", str(tmp_path / "records.json"), "--image_folder", str(tmp_path), "--output_dir", "unused"]
    common += ["--stage", "finetune_lora"]
    plain = parse(common)
    changed = parse([*common, "--learning_rate", "0.5", "--lora_alpha", "9", "--template", "plain"])
    differ = {k for k, v in changed.record().items() if plain.record()[k] != v}
    assert differ == {"arguments.learning_rate", "settings.lora.alpha", "settings.template"}
    assert RunArguments().preset == "tiny"


@pytest.mark.parametrize(("name", "language"), [("vicuna-7b", 6_738_415_616), ("vicuna-13b", 13_015_864_320)])
def test_vicuna_builds_at_true_size_on_the_meta_device(name, language):
    model = build_on_meta(name)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    counts = dict(parameter_table(model))
    hidden = model.config.text_config.hidden_size
    assert counts["language model"] == language + 2 * 64 * hidden  # 64 more rows, for <image>
    assert counts["projector"] == 1024 * hidden + hidden + hidden * hidden + hidden
    assert model.config.image_seq_length == 576
    assert model.config.vision_config.expert_names == ["eva", "dinov2", "depth", "edge"]
    assert all(spec.is_complete for spec in model.config.vision_config.expert_specs)


def test_meta_flag_prints_every_part(capsys):
    assert main(["--preset", "vicuna-7b", "--meta"]) == 0
    lines = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[2:]]
    rows = {part: numbers for part, *numbers in lines}
    assert rows["language model"] == ["6,738,939,904", f"{float(rows['language model'][1].replace(',', '')):,.1f}"]
    gflops = {part: float(row[1].replace(",", "")) for part, row in rows.items() if len(row) == 2}
    assert gflops["CLIP"] == pytest.approx(366, rel=0.02)  # its last block is not built
    assert gflops["expert dinov2"] == pytest.approx(382, rel=0.05)
    assert gflops["language model"] == pytest.approx(8600, rel=0.03)
    assert {"expert eva", "expert depth", "expert edge", "projector", "all"} <= set(rows)
