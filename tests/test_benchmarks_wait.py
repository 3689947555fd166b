"""The benchmark of waiting for data at toy size: its share is the one that training logs after the first steps."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
BRIEF = ["--device", "cpu", "--repeats", "1", "--steps", "5", "--batch", "2", "--workers", "0"]


@pytest.fixture(scope="module")
def program():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import data_wait

        yield data_wait
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("data_wait", "common"):
            sys.modules.pop(name, None)


def test_it_tells_the_share_that_training_logs(program, tmp_path, monkeypatch):
    train, logged = program.train, []

    def kept(flags):
        code = train(flags)
        output = Path(flags[flags.index("--output_dir") + 1])
        logged.append(json.loads((output / "trainer_state.json").read_text())["log_history"])
        return code

    monkeypatch.setattr(program, "train", kept)
    assert program.main([*BRIEF, "--stages", "finetune_lora", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "data_wait-tiny-cpu.json").read_text())
    assert len(logged) == 2, "stage 1, which stage 2 starts from, and stage 2"
    entries = {entry["step"]: entry["data_wait"] for entry in logged[1] if "data_wait" in entry}
    assert list(entries) == [5, 10] and entries[5] != entries[10]
    row = record["stages"]["finetune_lora"]
    assert (row["batch"], row["workers"]) == (2, 0)
    assert 0 < row["data_wait"]["median"] == entries[10] < 1
    name = "share of a run's time that waits for data, finetune_lora"
    assert record["targets"] == [{"name": name, "value": entries[10], "target": 0.02, "at_least": False}]
    page = (tmp_path / "data_wait-tiny-cpu.md").read_text()
    assert ("| met |" in page) == (entries[10] <= 0.02)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "7"], "multiples of 5"),
        (["--warmup", "0"], "multiples of 5"),
        (["--stages", "pretrian"], "Did you mean 'pretrain'"),
        (["--dtype", "bfloat16"], "no --dtype"),
    ],
)
def test_bad_flags_are_told(program, tmp_path, capsys, flags, message):
    assert program.main([*BRIEF, *flags, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
