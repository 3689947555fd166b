"""The benchmark of cached features: what it computes from what it measures, and one small run of it."""

import json
import sys

import numpy as np
import pytest
from train_parts import ROOT

from tove_llava.errors import ConfigError

sys.path.insert(0, str(ROOT / "benchmarks"))

import cached_features
from cached_features import FEW, cache_cost, compression, consequences, rounding

RATES = {"pretrain": {"plain": 10.0, "cached": 20.0}, "finetune_lora": {"plain": 5.0, "cached": 4.0}}


def test_what_follows_from_rates_and_cost():
    found = consequences(RATES, {"begin": 2.0, "picture": 0.01}, runs=3, scenes=100)
    assert found["break_even_epochs"] == {"pretrain": pytest.approx(3 / 5), "finetune_lora": None}
    study = found["study"]
    assert study["one_time_seconds"] == pytest.approx(3)
    assert study["seconds_without"] == pytest.approx(3 * 100 * 0.3)
    assert study["seconds_with"] == pytest.approx(3 * 100 * 0.3 + 3)
    assert study["ratio"] < 1


def test_cost_of_a_cache():
    cost = cache_cost([2.0, 1.8, 9.0], [4.0, 4.0, 4.0], FEW + 100)
    assert cost == {"begin": pytest.approx(2.0 - FEW * 0.02), "picture": pytest.approx(0.02)}
    with pytest.raises(ConfigError, match="too busy"):
        cache_cost([2.0], [1.9], FEW + 100)


def test_compression_of_what_can_be_compressed(tmp_path):
    noise = np.random.default_rng(0).normal(size=(30, 40, 8)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    sizes = {(row["dtype"], row["codec"]): row["size"] for row in compression(tmp_path, 0)}
    assert sizes["float32", "none"] == 1 and sizes["float16", "none"] == 0.5
    assert 0.5 < sizes["float32", "zlib 6"] < 1
    assert sizes["float32", "zlib 6, bytes by significance"] < sizes["float32", "zlib 6"]
    assert 0 < rounding(tmp_path) < 0.01
    np.save(tmp_path / "noise.npy", np.zeros_like(noise))
    sizes = {(row["dtype"], row["codec"]): row["size"] for row in compression(tmp_path, 0)}
    assert sizes["float16", "zlib 1"] < 0.05


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scenes", str(FEW)], "--scenes"),
        (["--steps", "3", "--log-every", "2"], "--steps"),
        (["--preset", "vicuna-7b", "--weights", "random"], "sources"),
    ],
)
def test_bad_flags_are_told(tmp_path, capsys, flags, message):
    assert cached_features.main(["--device", "cpu", "--output", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run(tmp_path):
    brief = ["--device", "cpu", "--scenes", "200", "--steps", "4", "--log-every", "2", "--repeats", "1", "--batch", "4"]
    assert cached_features.main([*brief, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "cached_features-tiny-cpu.json").read_text())
    assert set(record["stages"]) == {"pretrain", "finetune_lora"}
    for row in record["stages"].values():
        rate = row["samples_per_second"]
        assert row["ratio"]["value"] == pytest.approx(rate["cached"]["median"] / rate["plain"]["median"])
        assert len(rate["plain"]["values"]) == 1, "the first log is left out"
    # CLIP: 36 tokens of 128; the experts' maps beside it.
    assert record["cache"]["bytes_per_picture"] > 36 * 128 * 4
