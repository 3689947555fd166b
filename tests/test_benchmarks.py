"""The benchmarks' command lines at toy size, and what they promise about their numbers."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tove_llava.llava.build import build_model, vision_config
from tove_llava.presets import load_preset

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
BRIEF = ["--device", "cpu", "--repeats", "3", "--warmup", "1", "--batch", "2"]

# True architectures from all four libraries under reduced CLIP and LLaMA configurations; no source is on any machine.
REDUCED = """
vision:
  clip: hf:nobody/reduced-clip
  clip_config:
    hidden_size: 32
    intermediate_size: 64
    num_hidden_layers: 3
    num_attention_heads: 2
    image_size: 56
    patch_size: 14
  projection_dim: 16
  experts:
    - {name: eva, source: "timm:eva02_tiny_patch14_224.mim_in22k", image_size: 28}
    - {name: depth, source: "hf:depth-anything/Depth-Anything-V2-Small-hf", image_size: 28}
    - {name: edge, source: "kornia:dexined", mode: map, image_size: 32}
language:
  source: hf:nobody/reduced-llama
  config:
    model_type: llama
    vocab_size: 100
    hidden_size: 32
    intermediate_size: 64
    num_hidden_layers: 3
    num_attention_heads: 2
    num_key_value_heads: 2
    pad_token_id: 0
stages:
  pretrain: {train: alignment, template: plain}
"""


@pytest.fixture(scope="module")
def modules():
    """The two programs, imported as Python imports a script's neighbours."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import tower
        import train_step

        yield tower, train_step
    finally:
        sys.path.remove(str(BENCHMARKS))
        parts = ("step_parts", "step_paths", "step_flops", "step_mix", "step_clip", "llava_mix", "mix_lengths")
        for name in ("tower", "train_step", "common", *parts):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tower_record(modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    assert modules[0].main([*BRIEF, "--executions", "concurrent", "--profile", "--output", str(folder)]) == 0
    return json.loads((folder / "tower-tiny-cpu.json").read_text()), (folder / "tower-tiny-cpu.md").read_text()


@pytest.fixture(scope="module")
def step_record(modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    flags = ["--text-tokens", "12", "--stages", "pretrain,finetune", "--peak-tflops", "0.5", "--no-mix"]
    assert modules[1].main([*BRIEF, *flags, "--output", str(folder)]) == 0
    return json.loads((folder / "train_step-tiny-cpu.json").read_text()), (
        folder / "train_step-tiny-cpu.md"
    ).read_text()


def median(entry):
    return entry["wall_seconds"]["median"]


def test_tower_ratios_are_those_of_the_run(tower_record):
    record, _ = tower_record
    rows, ratios = record["contenders"], record["ratios"]
    assert ratios["loop_over_tove"]["value"] == pytest.approx(median(rows["loop"]) / median(rows["tove"]))
    assert ratios["tove_over_clip"]["value"] == pytest.approx(median(rows["tove"]) / median(rows["clip"]))
    pairs = zip(rows["loop"]["wall_seconds"]["values"], rows["tove"]["wall_seconds"]["values"], strict=True)
    inside = sorted(a / b for a, b in pairs)
    assert inside[0] <= ratios["loop_over_tove"]["paired_q1"] <= ratios["loop_over_tove"]["paired_q3"] <= inside[-1]
    for row in rows.values():
        assert len(row["wall_seconds"]["values"]) == 3
        assert row["images_per_second"] == pytest.approx(2 / median(row))
        assert row["peak_bytes_above_weights"] > 0 and row["weight_bytes"] > 0


def test_tower_targets_are_figures_of_the_run(tower_record):
    record, markdown = tower_record
    rows, found = record["contenders"], record["figures"]
    fastest = min((name for name in rows if name.startswith("tove")), key=lambda name: median(rows[name]))
    assert found["fastest"] == fastest and "tove_concurrent" in rows
    speed, work, ceiling, fusion = record["targets"]
    assert speed["value"] == pytest.approx(median(rows["loop"]) / median(rows[fastest])) and speed["at_least"]
    # CLIP-L without its last block, EVA-02-L, DINOv2-L, Depth-Anything-V2-S's encoder, DexiNed: public figures
    assert work["value"] == pytest.approx((366 + 382 + 382 + 32 + 114) / 1e3, rel=0.03) and not work["at_least"]
    assert ceiling["value"] is None and fusion["value"] is None  # they need a GPU
    assert markdown.count("not measured (needs a GPU)") == 2 and "| missed |" in markdown
    achieved = rows["tove"]["gflop_per_image"] / 1e3 * 2 / median(rows[fastest])
    assert found["achieved_tflops"] == pytest.approx(achieved)
    assert found["share_of_matrix_product"] == pytest.approx(achieved / found["matrix_product_tflops"])


def test_tower_parts_make_up_the_whole(tower_record):
    record, _ = tower_record
    experts = [entry["name"] for entry in load_preset("tiny").vision.experts]
    assert list(record["parts"]) == ["clip", *experts, "fusion"]
    for share in ("share_of_time", "share_of_cpu_time"):
        assert sum(part[share] for part in record["parts"].values()) == pytest.approx(1)
    whole = record["contenders"]["tove"]
    assert sum(part["gflop_per_image"] for part in record["parts"].values()) == pytest.approx(whole["gflop_per_image"])
    assert sum(part["weight_bytes"] for part in record["parts"].values()) == whole["weight_bytes"]


def test_the_loop_computes_what_the_tower_leaves_out(tower_record):
    rows = tower_record[0]["contenders"]
    vision = vision_config(load_preset("tiny").vision)
    assert vision.clip_layer == -2  # one block of CLIP is what the loop adds, as this preset's experts run whole
    width, inner, tokens = vision.hidden_size, vision.clip_config.intermediate_size, vision.num_patches + 1
    block = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    assert (rows["loop"]["gflop_per_image"] - rows["tove"]["gflop_per_image"]) * 1e9 == pytest.approx(block)


def test_results_name_versions_device_and_no_place(tower_record, step_record):
    for record, markdown in (tower_record, step_record):
        assert record["versions"]["torch"] == importlib.metadata.version("torch")
        assert record["device"]["type"] == "cpu" and "thread" in record["device"]["description"]
        assert record["weights"] == "source" and record["dtype"] == "float32"
        assert record["versions"]["transformers"] in markdown
        assert ("other programs" in markdown) == record["machine"]["shared"]
        for text in (json.dumps(record), markdown):
            assert str(ROOT) not in text and os.uname().nodename not in text


def test_step_figures_follow_from_its_times(step_record):
    record, markdown = step_record
    assert "recomputation" in record["flop_convention"] and record["flop_convention"] in markdown
    for row in record["stages"].values():
        seconds = median(row["timings"]["step"])
        assert row["sequence_length"] == row["image_tokens"] + 12
        assert row["samples_per_second"] == pytest.approx(2 / seconds)
        assert row["tokens_per_second"] == pytest.approx(2 * row["sequence_length"] / seconds)
        needed = row["needed_gflop_per_step"]
        assert needed["all"] == pytest.approx(needed["frozen_encoders"] + needed["forward"] + needed["backward"])
        assert row["achieved_tflops"] == pytest.approx(needed["all"] / 1e3 / seconds)
        assert row["mfu"] == pytest.approx(row["achieved_tflops"] / 0.5)
        assert row["share_of_matrix_product"] == pytest.approx(row["achieved_tflops"] / row["matrix_product_tflops"])
        cached = median(row["timings"]["step_without_encoders"])
        assert row["encoders_share_of_time"] == pytest.approx(1 - cached / seconds)
        memory = row["memory"]
        assert memory["peak_bytes"] == memory["resident_bytes"] + memory["peak_bytes_above_resident"]


def test_only_needed_flops_are_counted(step_record):
    pretrain, full = (step_record[0]["stages"][name] for name in ("pretrain", "finetune"))
    alignment, whole = pretrain["needed_gflop_per_step"], full["needed_gflop_per_step"]
    assert alignment["frozen_encoders"] == pytest.approx(whole["frozen_encoders"])
    assert alignment["forward"] == pytest.approx(whole["forward"])
    # Where everything trains, backward is twice forward, but for the tower's inputs, which need no gradient.
    assert 1.8 < whole["backward"] / whole["forward"] <= 2.0
    # The frozen language model needs the gradients of activations alone.
    assert 1.0 < alignment["backward"] / alignment["forward"] < whole["backward"] / whole["forward"]
    assert full["trained_parameters"]["language model"] > 0 and "language model" not in pretrain["trained_parameters"]
    assert full["memory"]["resident_bytes"] > pretrain["memory"]["resident_bytes"]  # the optimiser's state


def test_checkpointing_trades_arithmetic_for_memory(modules):
    from step_flops import count_flops

    train_step = modules[1]
    step = train_step.TrainingStep(build_model("tiny")[0], load_preset("tiny").stage("pretrain"), torch.float32)
    batch = train_step.make_batch(step.model, 2, 64, torch.float32, seed=0)
    rest = train_step.with_features(batch, step.encode(batch["pixel_values"]))

    def run():
        step.optimizer.zero_grad(set_to_none=True)
        step.forward(rest).backward()

    def cost():
        return train_step.peak_memory(run, step.device), count_flops(run)

    (memory, flops), _ = cost(), train_step.set_checkpointing(step.model, "full")
    less_memory, more_flops = cost()
    assert less_memory < memory and more_flops > flops  # why needed FLOPs are counted with checkpointing off


def test_random_weights_where_the_sources_are_out_of_reach(modules, tmp_path, capsys):
    tower, train_step = modules
    preset = tmp_path / "reduced.yaml"
    preset.write_text(REDUCED)
    flags = [*BRIEF, "--preset", str(preset), "--repeats", "1", "--output", str(tmp_path)]
    assert tower.main([*flags, "--executions", "concurrent"]) == 0
    assert "random weights (not on this machine: hf:nobody/reduced-clip" in capsys.readouterr().out
    record = json.loads((tmp_path / "tower-reduced-cpu.json").read_text())
    assert record["weights"] == "random" and list(record["parts"]) == ["clip", "eva", "depth", "edge", "fusion"]
    assert record["contenders"]["loop"]["weight_bytes"] > record["contenders"]["tove"]["weight_bytes"]
    assert (
        train_step.main([*flags, "--text-tokens", "4", "--stages", "pretrain", "--dtype", "bfloat16", "--no-mix"]) == 0
    )
    record = json.loads((tmp_path / "train_step-reduced-cpu.json").read_text())
    assert record["weights"] == "random" and record["dtype"] == "bfloat16"
    parts = record["stages"]["pretrain"]["trained_parameters"]
    assert set(parts) == {"projector", "tower"}


def features(base, **experts):
    from tove_llava.tower import TowerFeatures

    return TowerFeatures(base=base, experts=experts)


def test_in_float32_an_execution_has_the_plain_towers_features(modules):
    compare, a, b = modules[0].compare, torch.randn(2, 9, 4), torch.randn(2, 3, 3, 3)
    plain = features(a, depth=b)
    found = compare(features(a * (1 + 9e-6), depth=b), plain, None)
    assert found["equal"] and found["worst"] == "CLIP" and found["distance"]["CLIP"] == pytest.approx(9e-6, rel=0.1)
    found = compare(features(a, depth=b * (1 + 2e-5)), plain, None)
    assert not found["equal"] and found["worst"] == "depth" and found["allowed"]["depth"] == 1e-5
    assert not compare(features(a, depth=b * float("nan")), plain, None)["equal"]


def test_in_16_bits_an_execution_is_no_farther_from_float32_than_the_plain_tower(modules):
    compare, exact = modules[0].compare, {"CLIP": torch.ones(1, 4, 4)}

    def off(by):
        return features(torch.ones(1, 4, 4) * (1 + by))

    assert compare(off(-0.0155), off(0.0157), exact)["equal"]  # 0.03 apart, and as near to the truth
    assert compare(off(0.018), off(0.0157), exact)["equal"]
    assert not compare(off(0.019), off(0.0157), exact)["equal"]
    assert not compare(off(0.01), off(0.0), exact)["equal"]


def test_the_towers_distances_are_in_the_record_and_on_the_page(tower_record):
    record, markdown = tower_record
    found = record["equality"]["tove_concurrent"]
    assert found["equal"] and found["compared_with"] == "plain tower"
    experts = [entry["name"] for entry in load_preset("tiny").vision.experts]
    assert list(found["distance"]) == ["CLIP", *experts] and max(found["distance"].values()) <= 1e-5
    assert "| ToVE tower, concurrent | " in markdown and "| plain tower | equal |" in markdown


def test_the_profile_shares_out_all_of_the_time(modules, tower_record):
    record, markdown = tower_record
    assert set(record["profile"]) == {"tove", "loop"}
    for shares in record["profile"].values():
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["matrix products"] > 0.02 and shares["convolutions"] > 0.02 and shares["norms"] > 0
    assert "| matrix products | convolutions | attention | norms | copies | rest |" in markdown
    kinds = {
        "aten::addmm": "matrix products", "aten::mkldnn_convolution": "convolutions", "aten::copy_": "copies",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention", "aten::native_layer_norm": "norms",
        "aten::_slow_conv2d_forward": "convolutions", "aten::gelu": "rest", "aten::cudnn_convolution": "convolutions",
    }  # fmt: skip
    assert {name: modules[0].kind_of(name) for name in kinds} == kinds


def test_an_execution_or_a_loop_that_fails_leaves_the_rest(modules, tmp_path, monkeypatch):
    tower = modules[0]

    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    optimised = tower.optimised
    monkeypatch.setattr(tower, "optimised", lambda *a: fails() if a[2] == "compiled" else optimised(*a))
    monkeypatch.setattr(tower.WholeEncoders, "__call__", fails)
    flags = [*BRIEF, "--repeats", "1", "--executions", "compiled,concurrent", "--output", str(tmp_path)]
    assert tower.main(flags) == 1
    record = json.loads((tmp_path / "tower-tiny-cpu.json").read_text())
    reason = "OutOfMemoryError: CUDA out of memory"
    assert record["not_measured"] == {"ToVE tower, compiled": reason, "loop over whole encoders": reason}
    assert list(record["contenders"]) == ["tove", "tove_concurrent", "clip"]
    speed, work, *_ = record["targets"]
    assert speed["value"] is None and speed["reason"] == reason and work["value"] > 1
    assert f"| loop over whole encoders | {reason} |" in (tmp_path / "tower-tiny-cpu.md").read_text()


def test_an_execution_that_differs_is_told_and_does_not_count(modules, tmp_path, monkeypatch):
    tower = modules[0]
    compare = tower.compare
    original, given = tower.figures, []

    def watched(samples, towers, *rest):
        given.append(towers)
        return original(samples, towers, *rest)

    monkeypatch.setattr(tower, "compare", lambda *a: {**compare(*a), "equal": False})
    monkeypatch.setattr(tower, "figures", watched)
    flags = [*BRIEF, "--repeats", "1", "--executions", "concurrent", "--output", str(tmp_path)]
    assert tower.main(flags) == 0 and given == [[]]
    record = json.loads((tmp_path / "tower-tiny-cpu.json").read_text())
    assert record["figures"]["fastest"] == "tove" and "tove_concurrent" in record["contenders"]
    assert "| **different**, and does not count |" in (tmp_path / "tower-tiny-cpu.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--preset", "tinny"], "Did you mean 'tiny'"),
        (["--dtype", "float33"], "float33"),
        (["--set", "vision.experts=[]", "--set", "vision.fusion=none"], "no experts"),
    ],
)
def test_bad_flags_are_told(modules, tmp_path, capsys, flags, message):
    assert modules[0].main([*BRIEF, "--output", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_gpu_and_an_unknown_stage_are_told(modules, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert modules[0].main(["--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "finds no GPU" in capsys.readouterr().err
    assert modules[1].main([*BRIEF, "--stages", "pretrian", "--output", str(tmp_path)]) == 2
    assert "Did you mean 'pretrain'" in capsys.readouterr().err


def test_smoke_script_names_what_exists():
    script = BENCHMARKS / "gpu_smoke.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text
    named = set(re.findall(r"\b(?:scripts|eval|benchmarks)/\w+\.(?:sh|py)\b", text))
    expected = {"scripts/pretrain.sh", "scripts/finetune_lora.sh", "eval/scenes.sh", "eval/pope.sh"}
    assert expected <= named
    assert all((ROOT / name).is_file() for name in named), named
    library = (ROOT / "scripts" / "lib.sh").read_text()
    for setting in ("LAUNCHER=torchrun", "DEEPSPEED_CONFIG=none"):
        assert setting in text and setting in library


def test_committed_results_are_whole():
    for file in (BENCHMARKS / "results").glob("*-*.json"):
        record = json.loads(file.read_text())
        assert file.stem == f"{record['benchmark']}-{record['preset']}-{record['device']['type']}"
        assert file.with_suffix(".md").is_file()
