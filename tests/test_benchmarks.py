"""Each program of benchmarks/ at toy size, and its figures."""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from answer_parts import before_forward
from benchmark_parts import BENCHMARKS, ROOT, bench, median, run
from measuring import Samples

from tove_llava.data import ImageTransform, LlavaDataset, load_tokenizer
from tove_llava.llava.build import vision_config
from tove_llava.presets import load_preset
from tove_llava.tower import TowerFeatures
from tove_llava.train.memory import checkpoint_size, stage_disk
from tove_llava.train.shapes import stage_shape

# True architectures from all four libraries under reduced CLIP and LLaMA configurations; no machine has these sources.
REDUCED = """
vision:
  clip: hf:nobody/reduced-clip
  clip_config: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 3, num_attention_heads: 2, image_size: 56, patch_size: 14}
  projection_dim: 16
  experts:
    - {name: eva, source: "timm:eva02_tiny_patch14_224.mim_in22k", image_size: 28}
    - {name: depth, source: "hf:depth-anything/Depth-Anything-V2-Small-hf", image_size: 28}
    - {name: edge, source: "kornia:dexined", mode: map, image_size: 32}
language:
  source: hf:nobody/reduced-llama
  config: {model_type: llama, vocab_size: 100, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 3, num_attention_heads: 2, num_key_value_heads: 2, pad_token_id: 0}
stages:
  pretrain: {train: alignment, template: plain}
  finetune: {train: full, template: v1}
"""  # noqa: E501


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def is_ratio(found, over, under):
    """Compare a ratio and its quartiles with two contenders' times."""
    pairs = zip(over["wall_seconds"]["values"], under["wall_seconds"]["values"], strict=True)
    inside = sorted(a / b for a, b in pairs)
    assert found["value"] == pytest.approx(median(over) / median(under))
    assert inside[0] <= found["paired_q1"] <= found["paired_q3"] <= inside[-1]


def test_tower(tmp_path):
    tower = importlib.import_module("tower")
    record, page = run(tower, tmp_path, "--batch", "2", "--executions", "concurrent", "--profile")
    rows, parts, found = record["contenders"], record["parts"], record["figures"]
    is_ratio(record["ratios"]["loop_over_tove"], rows["loop"], rows["tove"])
    is_ratio(record["ratios"]["tove_over_clip"], rows["tove"], rows["clip"])
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(2 / median(row))
        assert row["peak_bytes_above_weights"] > 0 and row["weight_bytes"] > 0
    experts = [entry["name"] for entry in load_preset("tiny").vision.experts]
    assert list(parts) == ["clip", *experts, "fusion"]
    for key, whole in (("share_of_time", 1), ("share_of_cpu_time", 1), ("gflop_per_image", rows["tove"])):
        assert sum(part[key] for part in parts.values()) == pytest.approx(whole if whole == 1 else whole[key])
    # The loop adds one block of CLIP; this preset's experts run whole in the tower too.
    vision = vision_config(load_preset("tiny").vision)
    width, inner, tokens = vision.hidden_size, vision.clip_config.intermediate_size, vision.num_patches + 1
    block = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    assert (rows["loop"]["gflop_per_image"] - rows["tove"]["gflop_per_image"]) * 1e9 == pytest.approx(block)

    fastest = min((name for name in rows if name.startswith("tove")), key=lambda name: median(rows[name]))
    achieved = rows["tove"]["gflop_per_image"] / 1e3 * 2 / median(rows[fastest])
    assert found["fastest"] == fastest and found["achieved_tflops"] == pytest.approx(achieved)
    speed, work, ceiling, fusion = record["targets"]
    assert speed["value"] == pytest.approx(median(rows["loop"]) / median(rows[fastest]))
    # CLIP-L without its last block, EVA-02-L, DINOv2-L, Depth-Anything-V2-S's encoder, DexiNed: published figures
    assert work["value"] == pytest.approx((366 + 382 + 382 + 32 + 114) / 1e3, rel=0.03)
    assert ceiling["value"] is None and fusion["value"] is None and page.count("not measured (needs a GPU)") == 2
    same = record["equality"]["tove_concurrent"]
    assert same["equal"] and list(same["distance"]) == ["CLIP", *experts] and max(same["distance"].values()) <= 1e-5
    for shares in record["profile"].values():
        assert sum(shares.values()) == pytest.approx(1) and shares["matrix products"] > 0.02
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    for text in (json.dumps(record), page):
        assert str(ROOT) not in text and os.uname().nodename not in text


def test_tower_counts_only_executions_with_its_features():
    tower = importlib.import_module("tower")
    seconds = {"tove": 2.0, "tove_compiled": 1.0, "loop": 4.0, "matrix_product": 1.0}
    seconds |= {"part/fusion": 0.4, "fusion/tove_compiled": 0.1}
    samples = {name: Samples([value] * 2, [value] * 2) for name, value in seconds.items()}
    for equal, fastest, over_loop, fusion in (([], "tove", 2, 0.2), (["tove_compiled"], "tove_compiled", 4, 0.1)):
        found = tower.figures(samples, equal, 1e12, 2e12)
        assert (found["fastest"], found["over_loop"]) == (fastest, over_loop)
        assert found["fusion_share_of_time"] == pytest.approx(fusion)
        assert found["share_of_matrix_product"] == pytest.approx(found["achieved_tflops"] / 2)


def test_tower_compares_features():
    compare, ones = importlib.import_module("tower").compare, torch.ones(1, 4, 4)
    plain = TowerFeatures(base=ones, experts={"depth": ones})

    def off(clip, depth=0.0):
        return TowerFeatures(base=ones * (1 + clip), experts={"depth": ones * (1 + depth)})

    found = compare(off(9e-6), plain, None)
    assert found["equal"] and found["worst"] == "CLIP" and found["distance"]["CLIP"] == pytest.approx(9e-6, rel=0.1)
    assert not compare(off(0, 2e-5), plain, None)["equal"] and not compare(off(0, float("nan")), plain, None)["equal"]
    exact = {"CLIP": ones, "depth": ones}  # in 16 bits: no farther from float32 than the plain tower
    assert compare(off(-0.0155), off(0.0157), exact)["equal"] and compare(off(0.018), off(0.0157), exact)["equal"]
    assert not compare(off(0.019), off(0.0157), exact)["equal"] and not compare(off(0.01), off(0.0), exact)["equal"]


def test_train_step_with_random_weights(tmp_path):
    (tmp_path / "reduced.yaml").write_text(REDUCED)
    flags = "--batch 2 --text-tokens 12 --no-mix --stages pretrain,finetune --peak-tflops 0.5 --dtype bfloat16"
    program = importlib.import_module("train_step")
    record, page = run(program, tmp_path, "--preset", str(tmp_path / "reduced.yaml"), *flags.split())
    assert record["weights"] == "random" and record["dtype"] == "bfloat16" and record["flop_convention"] in page
    for row in record["stages"].values():
        seconds, needed = median(row["timings"]["step"]), row["needed_gflop_per_step"]
        assert row["sequence_length"] == row["image_tokens"] + 12
        assert row["samples_per_second"] == pytest.approx(2 / seconds)
        assert row["tokens_per_second"] == pytest.approx(2 * row["sequence_length"] / seconds)
        assert needed["all"] == pytest.approx(needed["frozen_encoders"] + needed["forward"] + needed["backward"])
        assert row["achieved_tflops"] == pytest.approx(needed["all"] / 1e3 / seconds)
        assert row["mfu"] == pytest.approx(row["achieved_tflops"] / 0.5)
        cached = median(row["timings"]["step_without_encoders"])
        assert row["encoders_share_of_time"] == pytest.approx(1 - cached / seconds)
    pretrain, full = (record["stages"][name] for name in ("pretrain", "finetune"))
    assert set(pretrain["trained_parameters"]) == {"projector", "tower"}
    alignment, whole = pretrain["needed_gflop_per_step"], full["needed_gflop_per_step"]
    assert alignment["forward"] == pytest.approx(whole["forward"])
    # Where everything trains, backward is twice forward, except for the tower's inputs, which need no gradient.
    assert 1.8 < whole["backward"] / whole["forward"] <= 2.0
    assert 1.0 < alignment["backward"] / alignment["forward"] < whole["backward"] / whole["forward"]
    assert full["memory"]["resident_bytes"] > pretrain["memory"]["resident_bytes"]  # the optimizer's state


def test_data_path(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAVA_SRC", raising=False)
    record, page = run(importlib.import_module("data_path"), tmp_path, "--count", "6", "--batch", "4")
    rows = {name: row["cpu_seconds"]["median"] for name, row in record["contenders"].items()}
    for name in ("ours", "ours_torch"):
        assert record["ratios"][name]["cpu_time"] == pytest.approx(rows["original"] / rows[name])
        assert record["contenders"][name]["records_per_core_second"] == pytest.approx(6 / rows[name])
    (target,) = record["targets"]
    assert target["value"] == record["ratios"]["ours_torch"]["cpu_time"]
    assert record["settings"]["original"] == "restated" and (target["value"] >= 3) == ("3 times, met" in page)


def test_data_path_reads_the_same_with_both_contenders(tmp_path):
    data_path, llava_mix = map(importlib.import_module, ("data_path", "llava_mix"))
    records = llava_mix.write_mix(tmp_path / "mix", 12, size=(80, 60), pictures=3)
    tokenizer = load_tokenizer("bundled:llm")
    ours = LlavaDataset(records, records.parent / "images", tokenizer, "v1", ImageTransform(336, "pad"), 576, 8192)
    theirs = data_path.Restated(json.loads(records.read_text()), records.parent / "images", tokenizer)
    images = 0
    for index in range(12):
        example, (ids, pixels) = ours[index], theirs[index]
        texts = [tokenizer.decode(x[x >= 0]).split() for x in (example["input_ids"], ids)]
        assert texts[0] == texts[1] and (example["input_ids"] < 0).sum() == (ids < 0).sum()
        if example["pixel_values"] is not None:
            images += 1
            assert torch.equal(example["pixel_values"][0], pixels)
    assert 0 < images < 13


def test_data_wait_is_the_share_that_training_logs(tmp_path, monkeypatch):
    program = importlib.import_module("data_wait")
    train, logged = program.train, []

    def kept(flags):
        code = train(flags)
        state = json.loads((Path(flags[flags.index("--output_dir") + 1]) / "trainer_state.json").read_text())
        logged.append({entry["step"]: entry["data_wait"] for entry in state["log_history"] if "data_wait" in entry})
        return code

    monkeypatch.setattr(program, "train", kept)
    flags = "--repeats 1 --warmup 5 --steps 5 --batch 2 --workers 0 --stages pretrain"
    record, _ = run(program, tmp_path, *flags.split())
    assert list(logged[0]) == [1, 5, 10] and logged[0][5] != logged[0][10]
    assert record["stages"]["pretrain"]["data_wait"]["median"] == logged[0][10] == record["targets"][0]["value"]


def test_detached(tmp_path, monkeypatch):
    program = importlib.import_module("detached")
    record, page = run(program, tmp_path, "--batch", "1")
    order = [entry["name"] for entry in load_preset("tiny").vision.experts]
    assert [step["removed"] for step in record["steps"]] == [order[:count] for count in (1, 2, 3, 4)]
    seconds = {name: median(row) for name, row in record["samples"].items()}
    for count, step in enumerate(record["steps"], 1):
        for kind in program.KINDS:
            assert step["wall"][kind]["fall"] == pytest.approx(1 - seconds[f"{kind}/{count}"] / seconds["whole"])
    furthest = [program.furthest(record["steps"], kind) for kind in program.KINDS]
    assert [goal["value"] for goal in record["targets"]] == furthest
    assert page.count("at most 0.1") == 2 and importlib.import_module("summary").main(["--output", str(tmp_path)]) == 0
    written = program.written_tower
    monkeypatch.setattr(program, "written_tower", lambda tower, experts: written(tower, tower.active_experts))
    with pytest.raises(AssertionError, match="not close"):  # a smaller tower that computes something else
        run(program, tmp_path, "--batch", "1")


def is_comparable(row, questions):
    assert row["same_answers"] == 1 and row["questions_per_second"] == pytest.approx(questions / median(row))


def test_eval_throughput(tmp_path):
    flags = ["--batch", "4", "--questions", "6", "--single", "2", "--per-picture", "3", "--answer-tokens", "3"]
    record, page = run(importlib.import_module("eval_throughput"), tmp_path, *flags)
    assert [(case["questions_per_picture"], case["answer_tokens"]) for case in record["cases"]] == [(1, 3), (3, 3)]
    for case in record["cases"]:
        rows = case["contenders"]
        assert list(rows) == ["single", "runner", "whole"]
        for row in rows.values():
            is_comparable(row, 1)
        is_ratio(case["ratios"]["runner_over_single"], rows["single"], rows["runner"])
        assert f"**{case['ratios']['runner_over_single']['value']:.2f} times**" in page


def test_eval_throughput_shares_images_only_in_the_runner(tmp_path, monkeypatch):
    program = importlib.import_module("eval_throughput")
    answerer = program.build_answerer(bench(batch=4), "source")
    questions = program.write_data(tmp_path, 6, 3, (40, 30), seed=0)
    encode, images, lengths = answerer.model.model.get_image_features, [], []

    def count(*args, **kwargs):
        images.append(len(kwargs["pixel_values"]))
        return encode(*args, **kwargs)

    monkeypatch.setattr(answerer.model.model, "get_image_features", count)
    texts = program.OneByOne(answerer, questions, workers=0, tokens=4, out=tmp_path / "answers.jsonl")()
    assert sum(images) == 6 and len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6
    images.clear()
    before_forward(answerer, monkeypatch, lambda ids: lengths.append(ids.shape[1]))
    assert program.runner(answerer, questions, tokens=4, batch=6, share=True)() == texts
    assert sum(images) == 2 and lengths.count(1) == 3, "three steps after the first words"


def test_serve_load(tmp_path):
    program = importlib.import_module("serve_load")
    record, page = run(program, tmp_path, "--warmup", "0", "--clients", "5", "--batch", "3", "--answer-tokens", "4")
    rows = record["contenders"]
    for row in rows.values():
        is_comparable(row, 5)
        assert row["tokens_per_second"] == pytest.approx(4 * row["questions_per_second"])
        first, whole = row["first_token_seconds"], row["answer_seconds"]
        assert 0 < first["median"] <= first["p95"] and first["median"] <= whole["median"] <= whole["p95"]
    assert record["ratio"]["value"] == pytest.approx(median(rows["single"]) / median(rows["together"]))
    assert f"**{record['ratio']['value']:.2f} times**" in page


def test_startup(tmp_path):
    flags = ["--warmup", "0", "--starts", "2", "--stages", "pretrain", "--counted", "tiny"]
    record, page = run(importlib.import_module("startup"), tmp_path, *flags)
    assert [goal["value"] for goal in record["targets"]] == [median(record["processes"][x]) for x in ("import", "help")]
    row = record["stages"]["pretrain"]
    trained, sizes = stage_shape(load_preset("tiny"), "pretrain").trained, row["checkpoint_bytes"]
    assert row["trained_parameters"] == trained
    assert 4 * trained < sizes["weights"] < 4 * trained + 20_000  # float32, and the file's header
    assert 12 * trained < sizes["all"] < 12 * trained + 100_000  # and two moments
    assert 4 * trained < row["folder_bytes"] < sizes["all"] and row["ready_seconds"] > 0 and "`tiny`, by count" in page
    preset = load_preset("vicuna-7b")
    shape = stage_shape(preset, "finetune_lora")
    by_config = {name: checkpoint_size(preset, shape, name) / shape.trained for name in ("zero2", "zero3", None)}
    assert by_config == {"zero2": 16, "zero3": 14, None: 12}  # ZeRO-2 writes what trains a second time
    own = checkpoint_size(preset, shape, preset.stage("finetune_lora").deepspeed)
    assert stage_disk(preset, "finetune_lora", shape) == 2 * shape.trained + 2 * own


@pytest.mark.slow
def test_cached_features(tmp_path):
    flags = ["--scenes", "200", "--steps", "4", "--log-every", "2", "--repeats", "1", "--batch", "4"]
    record, _ = run(importlib.import_module("cached_features"), tmp_path, *flags)
    assert set(record["stages"]) == {"pretrain", "finetune_lora"}
    for row in record["stages"].values():
        rate = row["samples_per_second"]
        assert row["ratio"]["value"] == pytest.approx(rate["cached"]["median"] / rate["plain"]["median"])
        assert len(rate["plain"]["values"]) == 1, "the first log is left out"
    assert record["cache"]["bytes_per_picture"] > 36 * 128 * 4  # CLIP's tokens, and the experts' maps


@pytest.mark.slow
def test_scaling(tmp_path, capfd):
    program = importlib.import_module("scaling")
    flags = ["--batch", "2", "--seconds", "0.1", "--scenes", "24", "--runs"]
    (tmp_path / "failed").mkdir()
    assert program.main([*flags, "merge:zero2", "--output", str(tmp_path / "failed")]) == 2  # wants a trained model
    said = capfd.readouterr().err
    assert "exit code" in said and "--pretrained" in said and not list((tmp_path / "failed").iterdir())
    record, _ = run(program, tmp_path, *flags, "pretrain:zero2,finetune_lora:zero3")
    assert list(record["runs"]) == ["pretrain zero2", "finetune_lora zero3"]
    for row in record["runs"].values():
        rates = {name: entry["samples_per_second"]["median"] for name, entry in row["contenders"].items()}
        for name in ("two_over_one", "apart_over_one", "two_over_apart"):
            over, _, under = name.partition("_over_")
            assert row["ratios"][name]["value"] == pytest.approx(rates[over] / rates[under])
        assert all(0 < entry["busy"]["median"] < 1.2 for entry in row["contenders"].values()), "one thread on one core"


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("tower", ["--repeats", "0"], "--repeats must be at least 1"),
        ("tower", ["--dtype", "float33"], "float33"),
        ("tower", ["--set", "vision.experts=[]", "--set", "vision.fusion=none"], "no experts"),
        ("train_step", ["--stages", "pretrian"], "Did you mean 'pretrain'"),
        ("train_step", ["--tokenizer", "/no/such/folder"], "no tokenizer folder"),
        ("train_step", ["--text-tokens", "1"], "--text-tokens must be at least 2"),
        ("data_path", ["--records", "x.json"], "--image-folder"),
        ("data_wait", ["--steps", "7"], "multiples of 5"),
        ("cached_features", ["--preset", "vicuna-7b", "--weights", "random"], "sources"),
        ("eval_throughput", ["--answer-tokens", "0"], "--answer-tokens"),
        ("serve_load", ["--answer-tokens", "0"], "--answer-tokens must be at least 1"),
        ("startup", ["--stages", "finetune"], "--stages must begin with pretrain"),
        ("scaling", ["--runs", "pretrain"], "'pretrain' is not STAGE:CONFIG"),
    ],
)
def test_wrong_flags_are_explained(tmp_path, capsys, name, flags, message):
    assert importlib.import_module(name).main(["--device", "cpu", *flags, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpu_smoke", "gpu"])
def test_scripts_for_a_gpu_name_existing_files(name):
    script = BENCHMARKS / f"{name}.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    named = set(re.findall(r"\b(?:scripts|eval|benchmarks|tests)/\w+\.(?:sh|py)\b", script.read_text()))
    smoke = {"scripts/pretrain.sh", "scripts/finetune_lora.sh", "eval/scenes.sh", "eval/pope.sh"}
    assert named >= (smoke if name == "gpu_smoke" else {"benchmarks/gpu_smoke.sh", "tests/test_tower_gpu.py"})
    assert os.access(script, os.X_OK) and all((ROOT / name).is_file() for name in named), named


def test_committed_results_are_whole():
    files = list((BENCHMARKS / "results").glob("*-*.json"))
    assert files
    for file in files:
        record = json.loads(file.read_text())
        assert file.stem == f"{record['benchmark']}-{record['preset']}-{record['device']['type']}"
        assert file.with_suffix(".md").is_file()
