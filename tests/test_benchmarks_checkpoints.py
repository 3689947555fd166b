"""The benchmark of checkpoints at toy size, and what its counts are held against."""

import json
import sys
from pathlib import Path

import pytest

from tove_llava.presets import load_preset

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
BRIEF = ["--repeats", "1", "--count", "tiny"]


@pytest.fixture
def program():
    """The program, imported as Python imports a script's neighbours."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import checkpoints

        yield checkpoints
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("checkpoints", "scaling", "scaling_worker", "common"):
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_checkpoints_are_as_large_as_counted(program, tmp_path):
    assert program.main([*BRIEF, "--stages", "pretrain,finetune_lora", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "checkpoints-tiny-cpu.json").read_text())
    assert list(record["stages"]) == ["pretrain", "finetune_lora"]
    for stage, row in record["stages"].items():
        files = {  # adapters have a file of their own in the model folder
            kind: sum(size for name, size in named.items() if name.endswith(".safetensors"))
            for kind, named in row["files"].items()
        }
        assert files["checkpoint"] == pytest.approx(4 * row["counted"]["trained_parameters"], rel=0.02)
        assert files["folder"] == pytest.approx(row["counted"]["folder_bytes"], rel=0.02)
        optimizer = sum(size for name, size in row["files"]["checkpoint"].items() if "optim_states" in name)
        assert optimizer == pytest.approx(12 * row["counted"]["trained_parameters"], rel=0.03), stage
        assert 0 <= row["checkpoint_bytes"] - row["counted"]["checkpoint_bytes"] < 3e6, stage
        for what in ("start", "resume", "load", "write"):
            assert row[f"{what}_seconds"]["median"] > 0
        assert len(row["write_seconds"]["values"]) == 3 and len(row["resume_seconds"]["values"]) == 1
    assert "## Stages of `tiny`, by count" in (tmp_path / "checkpoints-tiny-cpu.md").read_text()


def test_counts_of_a_large_preset_by_hand(program):
    row = program.counted(load_preset("vicuna-7b"), "finetune_lora")
    adapters = 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))  # rank 128 on seven layers of 32 blocks
    assert adapters < row["trained_parameters"] < 1.2 * adapters, "and projector, gate and projections"
    assert row["deepspeed"] == "zero3"
    assert row["folder_bytes"] == 2 * row["trained_parameters"]
    assert row["checkpoint_bytes"] == 14 * row["trained_parameters"]
    row = program.counted(load_preset("vicuna-7b"), "pretrain")
    assert row["deepspeed"] == "zero2" and row["checkpoint_bytes"] == 16 * row["trained_parameters"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages", "nonsense"], "nonsense"),
        (["--count", "nonsense"], "nonsense"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--weights", "random"], "--weights"),
    ],
)
def test_wrong_flags_are_explained(program, tmp_path, capsys, flags, message):
    assert program.main([*BRIEF, *flags, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
