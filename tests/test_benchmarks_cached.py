"""The benchmark of cached features: what it computes from what it measures, and one small run of it."""

import json
import sys

import numpy as np
import pytest
from train_parts import ROOT

from tove_llava.core.errors import ConfigError

sys.path.insert(0, str(ROOT / "benchmarks"))

import cached_features
from cached_features import FEW, cache_cost, consequences, stored

from tove_llava.train.feature_stores import write_shard

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


def test_ways_of_storing(tmp_path):
    def sizes_of(values):
        (tmp_path / "noise").mkdir(exist_ok=True)
        (tmp_path / "noise" / "part.json").touch()
        write_shard(tmp_path / "noise" / "000000.safetensors", values, "float32")
        rows = stored(tmp_path, 0)
        return {(row["store"], row["codec"]): row["size"] for row in rows}, rows

    noise = np.random.default_rng(0).normal(size=(64, 40, 32)).astype(np.float32)
    sizes, rows = sizes_of(noise)
    plain = [sizes[store, "none"] for store in ("float32", "float16", "int8")]
    assert plain == pytest.approx([1, 0.5, 1.125 / 4], rel=0.01)
    assert all(sizes[store, "zlib 6"] < size for store, size in zip(("float32", "float16", "int8"), plain, strict=True))
    errors = [row["rms_error"] for row in rows if row["codec"] == "none"]
    assert errors[0] == 0 < errors[1] < errors[2] < 0.01
    sizes, _ = sizes_of(np.zeros_like(noise))
    assert sizes["float16", "zlib 1"] < 0.05


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scenes", "20"], "--scenes"),
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
