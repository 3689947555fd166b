"""The training step's benchmark on LLaVA-1.5's mix at toy size: what is compared, and how work is counted."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from train_parts import ROOT

from tove_llava import build_model, load_preset
from tove_llava.errors import ConfigError
from tove_llava.llava.varlen import packed_rows

TOKENIZER = ["--tokenizer", "bundled:llm"]


@pytest.fixture(scope="module")
def parts():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    names = ("common", "llava_mix", "step_parts", "step_flops", "step_mix", "step_clip", "train_step")
    for name in names:
        sys.modules.pop(name, None)
    try:
        import step_clip
        import step_flops
        import step_mix
        import train_step

        yield step_mix, step_flops, step_clip, train_step
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bench(parts):
    from common import Bench, argument_parser

    parser = argument_parser("")
    parser.set_defaults(device="cpu", batch=4, tokenizer="bundled:llm", checkpointing_gib=None)
    return Bench(parser.parse_args([]))


@pytest.fixture(scope="module")
def step(parts, bench):
    from step_parts import TrainingStep

    return TrainingStep(build_model("tiny")[0], load_preset("tiny").stage("finetune_lora"), torch.float32)


@pytest.fixture(scope="module")
def batches(parts, bench, step):
    return parts[0].micro_batches(bench, step.model, 4, 2)


def test_both_contenders_get_the_same_records(batches, step):
    picture = step.model.config.image_token_index
    for batch in batches:
        real = batch.padded["attention_mask"].bool()
        assert torch.equal(batch.packed["input_ids"][0], batch.padded["input_ids"][real])
        assert real.sum(1).tolist() == batch.lengths and max(batch.lengths) == real.shape[1]
        for row, pictured in zip(batch.padded["input_ids"], batch.pictures, strict=True):
            assert int((row == picture).sum()) == pictured * step.model.config.vision_config.num_image_tokens
        assert len(batch.packed["supervised"]) == sum(batch.supervised) and "supervised" not in batch.padded
        assert batch.padded["input_ids"].max() <= picture


def test_the_counted_work_is_that_of_the_records(parts, batches, step):
    """Counted on the packed row itself; and for text alone, whose lowest layer needs no gradient of its input."""
    flops = parts[1].record_flops(step)
    for batch in batches:
        with packed_rows(step.model.model.language_model):
            counted = sum(step.needed_flops(batch.packed).values())
        if all(batch.pictures):
            assert sum(map(flops[True], batch.lengths, batch.supervised)) == pytest.approx(counted, rel=1e-6)
        elif not any(batch.pictures):
            assert sum(map(flops[False], batch.lengths, batch.supervised)) == pytest.approx(counted, rel=1e-6)
    assert any(all(batch.pictures) for batch in batches)
    assert flops[False](50, 5) < flops[True](50, 5)
    assert flops[False].fixed == pytest.approx(0, abs=1e-6 * flops[False](50, 5))


def test_preparing_a_contender_leaves_nothing_behind(parts, bench, step, batches):
    both = parts[0].Contenders(bench, step, batches)
    language = step.model.model.language_model
    attention = language.config._attn_implementation
    both.prepare("original")
    assert language.layers[0].gradient_checkpointing and language.config._attn_implementation == attention
    both.prepare("ours")
    assert not language.layers[0].gradient_checkpointing and language.config._attn_implementation == "tove_varlen"
    both.close()
    assert language.config._attn_implementation == attention and not language.layers[0].gradient_checkpointing


class PretendedGpu(str):
    """torch takes it for the CPU, the benchmark for a GPU."""

    type = "cuda"


@pytest.fixture
def on_gpu(parts, bench, monkeypatch):
    """The GPU's part of the benchmark, on the CPU: what is asked of a GPU's memory is given here."""
    from common import GB, peak_memory

    monkeypatch.setattr(bench, "device", PretendedGpu("cpu"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * GB)
    monkeypatch.setattr(parts[0], "check_kernels", refuse_kernels)
    monkeypatch.setattr(parts[0], "peak_memory", lambda run, device: peak_memory(run, torch.device("cpu")))
    return bench


def refuse_kernels(device):
    raise ConfigError("no kernels here")


@pytest.mark.parametrize(("total", "gib"), [(80, 75), (12, 0)])
def test_the_budget_is_what_is_free_between_steps(parts, on_gpu, step, batches, monkeypatch, total, gib):
    from common import GB

    memory = SimpleNamespace(total_memory=total * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    both = parts[0].Contenders(on_gpu, step, batches)
    step.optimizer.state.clear()
    both.fit_budget()
    assert step.optimizer.state, "measured before the optimiser has its state"
    assert both.budget == pytest.approx(max(0, (gib - 10) * GB - parts[0].MARGIN) / 2**30, abs=0.051)
    both.prepare("ours")
    assert step.model.model.language_model.layers[0].gradient_checkpointing
    both.run("ours")
    both.close()
    both.budget = 3.0
    both.fit_budget()
    assert both.budget == 3.0  # as given


def test_the_memory_of_qlora_is_measured(parts, on_gpu, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from common import GB

    monkeypatch.setattr(on_gpu.args, "mix_batches", 1, raising=False)
    found = parts[0].measure_qlora(on_gpu, "source")
    assert found["batch"] == 4 and found["checkpointing_gib"] == 5.0
    assert 10 * GB < found["peak_bytes"] < 11 * GB


def test_work_on_the_meta_device_is_that_of_the_model(parts):
    """Of a preset that can be run: encoders, fusion, projector and all its layers, against one step counted whole."""
    from step_parts import TrainingStep, make_batch

    preset = load_preset("tiny")
    for one, experts in ((preset, 4), (parts[1].without_experts(preset), 0)):
        assert len(one.vision.experts) == experts
        step = TrainingStep(build_model(one)[0], one.stage("finetune_lora"), torch.float32)
        whole = sum(step.needed_flops(make_batch(step.model, 1, 40, torch.float32, 0, supervised=20)).values())
        on_meta = parts[1].step_flops_on_meta(one, "finetune_lora", 40, 20)
        assert on_meta == pytest.approx(whole, rel=0.01)


def test_the_page_and_its_targets(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(parts[2], "COUNTED", "tiny")
    monkeypatch.setattr(parts[2], "STAGES", {"finetune_lora": (8, 4, 1.09)})
    monkeypatch.setattr(parts[0], "PICTURES", 2)
    sizes = ["--device", "cpu", "--batch", "2", "--repeats", "1", "--warmup", "1", "--mix-batches", "1"]
    flags = [*sizes, "--mix-repeats", "2", "--stages", "finetune_lora", *TOKENIZER, "--output", str(tmp_path)]
    assert parts[3].main(flags) == 0
    record = json.loads((tmp_path / "train_step-tiny-cpu.json").read_text())
    page = (tmp_path / "train_step-tiny-cpu.md").read_text()
    mix = record["mix"]
    rows = mix["contenders"]
    medians = {name: row["wall_seconds"]["median"] for name, row in rows.items()}
    assert mix["ratio"]["value"] == pytest.approx(medians["original"] / medians["ours"])
    for name, row in rows.items():
        assert row["samples_per_second"] == pytest.approx(2 / medians[name])
        assert row["achieved_tflops"] == pytest.approx(mix["needed_tflop"] / medians[name])
        assert row["memory"]["peak_bytes"] > row["memory"]["resident_bytes"] > 0
    assert rows["ours"]["positions_that_are_padding"] == 0 == rows["original"]["positions"] % 2
    targets = {row["name"]: row for row in record["targets"]}
    assert len(targets) == 6 and all(row.keys() == {"name", "value", "target", "at_least"} for row in record["targets"])
    assert {row["value"] for name, row in targets.items() if "memory" in name or name.startswith("time")} == {None}
    assert targets["samples/s over the original recipe's, tiny, LLaVA-1.5's mix"]["value"] == mix["ratio"]["value"]
    assert record["qlora"] is None and "not measured (needs a GPU)" in page and "restated" in page
    assert os.uname().nodename not in page
