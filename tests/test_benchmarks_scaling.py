"""The benchmark of ranks at toy size: real launchers, turns, and what it promises about its numbers."""

import json
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
BRIEF = ["--repeats", "2", "--warmup", "1", "--batch", "2", "--seconds", "0.1", "--scenes", "24"]
RATIOS = {"two_over_one": ("two", "one"), "apart_over_one": ("apart", "one"), "two_over_apart": ("two", "apart")}


@pytest.fixture
def program():
    """The program, imported as Python imports a script's neighbours."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import scaling

        yield scaling
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("scaling", "scaling_worker", "common"):
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_contenders_take_turns_and_ratios_are_those_of_the_run(program, tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two ranks need two cores")
    assert program.main([*BRIEF, "--runs", "pretrain:zero2,finetune_lora:zero3", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "scaling-tiny-cpu.json").read_text())
    assert list(record["runs"]) == ["pretrain zero2", "finetune_lora zero3"]
    for row in record["runs"].values():
        assert row["batch_per_rank"] == 2 and row["timed_steps"] >= 2
        rates = {name: entry["samples_per_second"] for name, entry in row["contenders"].items()}
        for name, (over, under) in RATIOS.items():
            assert row["ratios"][name]["value"] == pytest.approx(rates[over]["median"] / rates[under]["median"])
        for entry in row["contenders"].values():
            assert len(entry["samples_per_second"]["values"]) == 2 and min(entry["samples_per_second"]["values"]) > 0
            assert 0 < entry["busy"]["median"] < 1.2, "a rank has one thread on one core"
    names = [target["name"] for target in record["targets"]]
    assert len(set(names)) == 2 and all(target["target"] == 1.8 and target["at_least"] for target in record["targets"])
    page = (tmp_path / "scaling-tiny-cpu.md").read_text()
    assert page.count("| met |") + page.count("| missed |") == 2


@pytest.mark.slow
def test_a_trainer_that_fails_is_told_with_what_it_said_and_leaves_no_process(program, tmp_path, capfd):
    flags = [*BRIEF, "--runs", "merge:zero2", "--output", str(tmp_path)]  # merging wants a trained model
    assert program.main(flags) == 2
    said = capfd.readouterr().err
    assert "exit code" in said and "--pretrained" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runs", "pretrain"], "'pretrain' is not STAGE:CONFIG"),
        (["--runs", "nonsense:zero2"], "nonsense"),
        (["--warmup", "0"], "--warmup must be at least 1"),
        (["--dtype", "bfloat16"], "--dtype"),
    ],
)
def test_wrong_flags_are_explained(program, tmp_path, capsys, flags, message):
    assert program.main([*BRIEF, *flags, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
