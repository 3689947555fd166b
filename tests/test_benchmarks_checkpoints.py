<<<<<<< HEAD:tests/test_benchmarks_startup.py
"""The benchmark of start-up and checkpoints at toy size, and that its figures are those of what was written."""
=======
"""The benchmark of checkpoints at toy size, and what its counts are held against."""
>>>>>>> ranks:tests/test_benchmarks_checkpoints.py

import json
import sys
from pathlib import Path

import pytest

from tove_llava.presets import load_preset
from tove_llava.train.memory import checkpoint_size, stage_disk
from tove_llava.train.shapes import stage_shape

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
<<<<<<< HEAD:tests/test_benchmarks_startup.py
BRIEF = ["--repeats", "2", "--warmup", "0", "--starts", "2", "--stages", "pretrain", "--counted", "tiny"]
=======
BRIEF = ["--repeats", "1", "--count", "tiny"]
>>>>>>> ranks:tests/test_benchmarks_checkpoints.py


@pytest.fixture(scope="module")
def program():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import checkpoints

        yield checkpoints
    finally:
        sys.path.remove(str(BENCHMARKS))
<<<<<<< HEAD:tests/test_benchmarks_startup.py
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
=======
        for name in ("checkpoints", "scaling", "scaling_worker", "common"):
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_checkpoints_are_as_large_as_counted(program, tmp_path):
    assert program.main([*BRIEF, "--stages", "pretrain,finetune_lora", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "checkpoints-tiny-cpu.json").read_text())
    assert list(record["stages"]) == ["pretrain", "finetune_lora"]
    for stage, row in record["stages"].items():
        files = {kind: row["files"][kind]["trained.safetensors"] for kind in ("checkpoint", "folder")}
        assert files["checkpoint"] == pytest.approx(4 * row["counted"]["trained_parameters"], rel=0.02)
        assert files["folder"] == pytest.approx(row["counted"]["folder_bytes"], rel=0.02)
        optimizer = sum(size for name, size in row["files"]["checkpoint"].items() if "optim_states" in name)
        assert optimizer == pytest.approx(12 * row["counted"]["trained_parameters"], rel=0.03), stage
        assert 0 <= row["checkpoint_bytes"] - row["counted"]["checkpoint_bytes"] < 3e6, stage
        for what in ("start", "resume", "load", "write"):
            assert row[f"{what}_seconds"]["median"] > 0
        assert len(row["write_seconds"]["values"]) == 3 and len(row["resume_seconds"]["values"]) == 1
    assert "## Stages of `tiny`, by count" in (tmp_path / "checkpoints-tiny-cpu.md").read_text()
>>>>>>> ranks:tests/test_benchmarks_checkpoints.py


def test_a_checkpoint_by_count():
    preset = load_preset("vicuna-7b")
    shape = stage_shape(preset, "finetune_lora")
    assert checkpoint_size(preset, shape) == 14 * shape.trained
    assert stage_disk(preset, "finetune_lora", shape) == 2 * shape.trained + 2 * checkpoint_size(preset, shape)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
<<<<<<< HEAD:tests/test_benchmarks_startup.py
        (["--stages", "finetune"], "--stages must begin with pretrain"),
        (["--stages", "pretrian"], "Did you mean 'pretrain'"),
        (["--dtype", "bfloat16"], "no --device cuda"),
=======
        (["--stages", "nonsense"], "nonsense"),
        (["--count", "nonsense"], "nonsense"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--weights", "random"], "--weights"),
>>>>>>> ranks:tests/test_benchmarks_checkpoints.py
    ],
)
def test_bad_flags_are_told(program, tmp_path, capsys, flags, message):
    assert program.main([*BRIEF, *flags, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
