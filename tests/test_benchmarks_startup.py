"""The benchmark of start-up and checkpoints at toy size, and that its figures are those of what was written."""

import json
import sys
from pathlib import Path

import pytest

from tove_llava.presets import load_preset
from tove_llava.train.memory import checkpoint_size, stage_disk
from tove_llava.train.shapes import stage_shape

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
BRIEF = ["--repeats", "2", "--warmup", "0", "--starts", "2", "--stages", "pretrain", "--counted", "tiny"]


@pytest.fixture(scope="module")
def program():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import startup

        yield startup
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("startup", "common"):
            sys.modules.pop(name, None)


def test_it_measures_what_the_trainer_writes(program, tmp_path):
    assert program.main([*BRIEF, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "startup-tiny-cpu.json").read_text())
    page = (tmp_path / "startup-tiny-cpu.md").read_text()
    medians = {name: row["wall_seconds"]["median"] for name, row in record["processes"].items()}
    assert [goal["value"] for goal in record["targets"]] == [medians["import"], medians["help"]]
    assert [(goal["target"], goal["at_least"]) for goal in record["targets"]] == [(0.3, False), (0.5, False)]
    assert all(len(row["wall_seconds"]["values"]) == 2 for row in record["processes"].values())
    assert all(row["cpu_seconds"]["median"] > 0 for row in record["processes"].values()), "processor time of children"

    row = record["stages"]["pretrain"]
    trained = stage_shape(load_preset("tiny"), "pretrain").trained
    assert row["trained_parameters"] == trained
    sizes = row["checkpoint_bytes"]
    assert 4 * trained < sizes["weights"] < 4 * trained + 20_000  # float32, and the file's header
    assert 12 * trained < sizes["all"] < 12 * trained + 100_000  # and two moments
    assert 4 * trained < row["folder_bytes"] < sizes["all"], "checkpoints are no part of what a stage leaves"
    for key in ("save_seconds", "load_seconds", "load_model_seconds"):
        assert len(row[key]["values"]) == 2 and min(row[key]["values"]) > 0
    assert row["ready_seconds"] > 0
    assert f"{sizes['all'] / 1e6:.1f} ({sizes['weights'] / 1e6:.1f})" in page and "`tiny`, by count" in page


def test_a_checkpoint_by_count():
    preset = load_preset("vicuna-7b")
    shape = stage_shape(preset, "finetune_lora")
    sizes = {name: checkpoint_size(preset, shape, name) / shape.trained for name in ("zero2", "zero3", None)}
    assert sizes == {"zero2": 16, "zero3": 14, None: 12}  # ZeRO-2 writes what trains once more
    own = checkpoint_size(preset, shape, preset.stage("finetune_lora").deepspeed)
    assert stage_disk(preset, "finetune_lora", shape) == 2 * shape.trained + 2 * own


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages", "finetune"], "--stages must begin with pretrain"),
        (["--stages", "pretrian"], "Did you mean 'pretrain'"),
        (["--dtype", "bfloat16"], "no --device cuda"),
    ],
)
def test_bad_flags_are_told(program, tmp_path, capsys, flags, message):
    assert program.main([*BRIEF, *flags, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
