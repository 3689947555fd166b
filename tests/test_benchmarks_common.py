"""Statistics of the benchmarks, failed parts, time limit, and machine facts."""

import subprocess
import sys
import time
from types import SimpleNamespace

import cached_features
import common
import detached
import numpy as np
import pytest
import torch
from benchmark_parts import bench
from common import target
from llava_child import LlavaChild
from measuring import FEWEST, Samples, measure, ratio, spread
from tower_parts import make_tower, open_output, pixels

from tove_llava.core.errors import ConfigError
from tove_llava.train.feature_stores import write_shard

CPU = torch.device("cpu")


def fail(error):
    raise error


def test_ratios_are_paired_by_repeat():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2, "q1": 1.5, "q3": 2.5, "values": [3.0, 1.0, 2.0]}
    assert spread([4.0])["q1"] == spread([4.0])["q3"] == 4
    slow, fast = Samples([2.0, 4.0, 9.0], [6.0] * 3), Samples([1.0, 4.0, 3.0], [2.0] * 3)
    assert ratio(slow, fast) == {"value": 4 / 3, "paired_q1": 1.5, "paired_q3": 2.5, "cpu_time": 3}


def test_a_failed_part_costs_only_itself(capsys):
    one = bench()
    record = one.record("x", "no")
    assert one.attempt(record, "first", lambda: 3) == 3 and record["not_measured"] == {}
    assert one.attempt(record, "second", lambda: fail(ConfigError("no bitsandbytes\nreally"))) is None
    assert one.attempt(record, "third", lambda: fail(RuntimeError("no file /a/b.c/d.so, a | b"))) is None
    assert one.attempt(record, "fourth", lambda: 4) == 4
    assert record["not_measured"] == {"second": "no bitsandbytes", "third": "RuntimeError: no file d.so, a / b"}
    said = capsys.readouterr().err
    assert "fail(RuntimeError" in said and "fail(ConfigError" not in said  # only a program's fault has a traceback
    assert common.run_command(lambda: record) == 1
    assert "second was not measured: no bitsandbytes" in capsys.readouterr().err
    assert common.run_command(lambda: one.record("x", "no")) == 0
    assert "| third | RuntimeError: no file d.so, a / b |" in common.lost_table(record)[0]


def test_no_part_begins_after_the_limit():
    one = bench("--limit", "0.001")
    record = one.record("x", "no")
    assert one.attempt(record, "first", lambda: fail(AssertionError("it began"))) is None
    assert record["not_measured"] == {"first": "the 0.001 s of --limit were over"}
    for is_over, repeats in ((True, FEWEST), (False, 9)):
        made = measure({"a": lambda: None}, repeats=9, warmup=0, device=CPU, is_over=lambda over=is_over: over)
        assert len(made["a"].wall) == repeats


def test_contenders_take_turns_and_one_that_fails_leaves_the_others():
    calls = []

    def late():
        calls.append("late")
        if calls.count("late") == 3:
            raise ConfigError("too late")

    contenders = {"good": lambda: calls.append("good"), "early": lambda: fail(ConfigError("too early")), "late": late}
    lost = {}
    samples = measure(contenders, repeats=4, warmup=1, device=CPU, lost=lost)
    assert list(samples) == ["good"] and len(samples["good"].wall) == 4
    assert lost == {"early": "too early", "late": "too late"}
    assert calls == ["good", "late", "good", "late", "late", "good", "good", "good"]
    with pytest.raises(ConfigError, match="too early"):
        measure(contenders, repeats=1, warmup=1, device=CPU)


def test_the_load_is_that_of_other_programs(monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        assert common.others_load(1.0) > 0.4
    finally:
        process.kill()
        process.wait()
    clock, own = iter([100.0, 103.0]), iter([1.0, 2.5])
    monkeypatch.setattr(common, "_busy_seconds", lambda: next(clock))
    monkeypatch.setattr(common, "time", SimpleNamespace(
        process_time=lambda: next(own), perf_counter=iter([0.0, 1.0]).__next__, sleep=lambda s: None
    ))  # fmt: skip
    assert common.others_load() == pytest.approx(1.5)


def test_llavas_code_answers_line_by_line_or_its_end_is_an_error(monkeypatch):
    monkeypatch.setenv("LLAVA_PYTHON", "/bin/cat")  # reads the script, whose lines are the answers
    child = LlavaChild("llava_child.py", "the child", {})
    assert child.made.startswith('"""LLaVA') and child.ask("more") == "" and child.ask("more") == "import json"
    child.close()
    monkeypatch.setenv("LLAVA_PYTHON", "/bin/false")
    with pytest.raises(ConfigError, match="the child ended with exit code 1"):
        LlavaChild("llava_child.py", "the child", {})


def test_the_commit_comes_from_the_environment_outside_a_repository(monkeypatch):
    monkeypatch.setenv("TOVE_COMMIT", "abc123")
    assert common.commit() != "abc123"
    monkeypatch.setattr(common, "_git", lambda *a: fail(subprocess.CalledProcessError(128, "git")))
    assert common.commit() == "abc123"
    monkeypatch.delenv("TOVE_COMMIT")
    assert common.commit() == "unknown" and {"triton", "liger-kernel", "bitsandbytes"} <= common.versions(CPU).keys()


def test_a_target_is_met_or_missed_or_says_why_it_was_not_measured():
    page = common.targets_table([
        target("a", 2.0, 2.0), target("b", 2.1, 2.0, at_least=False), target("c", None, 2.0),
        target("d", None, 2.0, reason="no memory"),
    ])  # fmt: skip
    assert "| a | 2 | at least 2 | met |" in page and "| b | 2.1 | at most 2 | missed |" in page
    assert "| c | not measured (needs a GPU) |" in page and "| d | not measured (no memory) |" in page
    assert "reason" not in target("e", 1.0, 2.0, reason="none needed")


def test_cost_and_gain_of_cached_features():
    few = cached_features.FEW
    cost = cached_features.cache_cost([2.0, 1.8, 9.0], [4.0, 4.0, 4.0], few + 100)
    assert cost == {"begin": pytest.approx(2.0 - few * 0.02), "picture": pytest.approx(0.02)}
    with pytest.raises(ConfigError, match="too busy"):
        cached_features.cache_cost([2.0], [1.9], few + 100)
    rates = {"pretrain": {"plain": 10.0, "cached": 20.0}, "finetune_lora": {"plain": 5.0, "cached": 4.0}}
    found = cached_features.consequences(rates, {"begin": 2.0, "picture": 0.01}, runs=3, scenes=100)
    assert found["break_even_epochs"] == {"pretrain": pytest.approx(3 / 5), "finetune_lora": None}
    expected = {"one_time_seconds": 3, "seconds_without": 90, "seconds_with": 93}
    assert {key: found["study"][key] for key in expected} == pytest.approx(expected)


def test_sizes_and_errors_of_stored_features(tmp_path):
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "part.json").touch()
    noise = np.random.default_rng(0).normal(size=(64, 40, 32)).astype(np.float32)
    write_shard(tmp_path / "noise" / "000000.safetensors", noise, "float32")
    rows = {(row["store"], row["codec"]): row for row in cached_features.stored(tmp_path, 0)}
    plain = [rows[store, "none"] for store in ("float32", "float16", "int8")]
    assert [row["size"] for row in plain] == pytest.approx([1, 0.5, 1.125 / 4], rel=0.01)
    errors = [row["rms_error"] for row in plain]
    assert errors[0] == 0 < errors[1] < errors[2] < 0.01
    assert all(rows[row["store"], "zlib 6"]["size"] < row["size"] for row in plain)


def test_shares_and_falls_of_detached_experts():
    # CLIP 20, experts 30 and 40, fusion 10, of which each expert has 3.
    wall = {"whole": 100.0, "expert/a": 30.0, "expert/b": 40.0, "fusion/0": 10.0, "fusion/1": 7.0, "fusion/2": 4.0}
    wall |= {f"{kind}/{count}": left for kind in detached.KINDS for count, left in ((1, 67.0), (2, 24.0))}
    medians = {"wall": wall, "cpu": wall | {"masked/1": 83.5, "written/2": 100.0}}  # half of the fall, and none
    steps = [detached.step(medians, gone) for gone in (["a"], ["a", "b"])]
    assert [entry["wall"]["encoders"] for entry in steps] == pytest.approx([0.30, 0.70])
    assert [entry["wall"]["share"] for entry in steps] == pytest.approx([0.33, 0.76])
    assert [entry["wall"]["masked"]["fall"] for entry in steps] == pytest.approx([0.33, 0.76])
    assert [detached.furthest(steps, kind) for kind in detached.KINDS] == pytest.approx([0, 0])
    assert [detached.furthest(steps, kind, "cpu") for kind in detached.KINDS] == pytest.approx([0.5, 1])


def test_a_written_tower_computes_what_the_masked_one_does(tmp_path):
    tower = make_tower(tmp_path)
    open_output(tower)
    small = detached.written_tower(tower, ["depth"])
    assert small.config.expert_names == ["edge", "normal"] and small.frozen.clip is tower.frozen.clip
    whole = tower(pixels()).last_hidden_state
    tower.detach_experts(["depth"])
    with torch.no_grad():
        assert torch.equal(small(pixels()).last_hidden_state, tower(pixels()).last_hidden_state)
    assert not torch.allclose(small(pixels()).last_hidden_state, whole, atol=1e-3)
