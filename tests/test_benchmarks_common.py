"""What all benchmarks share: what a part that fails costs, the time limit, and what is said of the machine."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from train_parts import ROOT

from tove_llava.core.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def common():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    sys.modules.pop("common", None)
    try:
        import common

        yield common
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        sys.modules.pop("common", None)


def bench(common, *flags):
    parser = common.argument_parser("", limit=True)
    parser.set_defaults(device="cpu", batch=2)
    return common.Bench(parser.parse_args(flags))


def fail(error):
    raise error


def test_a_part_that_fails_costs_itself_alone(common, capsys):
    one = bench(common)
    record = one.record("x", "no")
    assert one.attempt(record, "first", lambda: 3) == 3 and record["not_measured"] == {}
    assert one.attempt(record, "second", lambda: fail(ConfigError("no bitsandbytes\nreally"))) is None
    assert one.attempt(record, "third", lambda: fail(RuntimeError("no file /a/b.c/d.so, a | b"))) is None
    assert one.attempt(record, "fourth", lambda: 4) == 4
    expected = {"second": "no bitsandbytes", "third": "RuntimeError: no file d.so, a / b"}
    assert record["not_measured"] == expected
    said = capsys.readouterr().err
    assert "fail(RuntimeError" in said and "fail(ConfigError" not in said  # where a fault of the program happened
    assert common.run_command(lambda: record) == 1
    assert "second was not measured: no bitsandbytes" in capsys.readouterr().err
    assert common.run_command(lambda: one.record("x", "no")) == 0
    assert "| third | RuntimeError: no file d.so, a / b |" in common.lost_table(record)[0]


def test_no_part_is_begun_after_the_limit(common):
    one = bench(common, "--limit", "0.001")
    record = one.record("x", "no")
    assert one.attempt(record, "first", lambda: fail(AssertionError("it was begun"))) is None
    assert record["not_measured"] == {"first": "the 0.001 s of --limit were over"}


def test_a_contender_that_fails_leaves_the_others_their_turns(common):
    calls = []

    def late():
        calls.append("late")
        if len(calls) == 3:
            raise ConfigError("too late")

    contenders = {"good": lambda: None, "early": lambda: fail(ConfigError("too early")), "late": late}
    lost = {}
    samples = common.measure(contenders, repeats=4, warmup=1, device=CPU, lost=lost)
    assert list(samples) == ["good"] and len(samples["good"].wall) == 4
    assert lost == {"early": "too early", "late": "too late"} and len(calls) == 3
    with pytest.raises(ConfigError, match="too early"):
        common.measure(contenders, repeats=1, warmup=1, device=CPU)


def test_repeats_end_with_the_limit_but_for_two(common):
    made = common.measure({"a": lambda: None}, repeats=9, warmup=0, device=CPU, is_over=lambda: True)
    assert len(made["a"].wall) == common.FEWEST == 2
    made = common.measure({"a": lambda: None}, repeats=9, warmup=0, device=CPU, is_over=lambda: False)
    assert len(made["a"].wall) == 9


def test_what_others_compute_is_not_what_this_program_does(common, monkeypatch):
    clock = iter([100.0, 103.0])
    own = iter([1.0, 2.5])
    monkeypatch.setattr(common, "_busy_seconds", lambda: next(clock))
    monkeypatch.setattr(common, "time", SimpleNamespace(
        process_time=lambda: next(own), perf_counter=iter([0.0, 1.0]).__next__, sleep=lambda s: None
    ))  # fmt: skip
    assert common.others_load() == pytest.approx(1.5)


def test_a_program_beside_it_is_seen(common):
    spin = "while True: pass"
    process = subprocess.Popen([sys.executable, "-c", spin])
    try:
        time.sleep(0.3)
        assert common.others_load(1.0) > 0.4
    finally:
        process.kill()
        process.wait()


def test_the_commit_comes_from_the_environment_outside_a_repository(common, monkeypatch):
    monkeypatch.setenv("TOVE_COMMIT", "abc123")
    assert common.commit() != "abc123"
    monkeypatch.setattr(common, "_git", lambda *a: fail(subprocess.CalledProcessError(128, "git")))
    assert common.commit() == "abc123"
    monkeypatch.delenv("TOVE_COMMIT")
    assert common.commit() == "unknown"


def test_versions_name_the_libraries_of_the_fast_path(common):
    assert {"triton", "liger-kernel", "bitsandbytes"} <= common.versions(CPU).keys()


def test_a_target_says_whether_it_is_met_or_why_not_measured(common):
    rows = [
        common.target("a", 2.0, 2.0),
        common.target("b", 2.1, 2.0, at_least=False),
        common.target("c", None, 2.0),
        common.target("d", None, 2.0, reason="no memory"),
    ]
    assert "reason" not in common.target("e", 1.0, 2.0, reason="none needed")
    page = common.targets_table(rows)
    for line in (
        "| a | 2 | at least 2 | met |",
        "| b | 2.1 | at most 2 | missed |",
        "| c | not measured (needs a GPU) | at least 2 |  |",
        "| d | not measured (no memory) | at least 2 |  |",
    ):
        assert line in page
