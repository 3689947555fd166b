"""The training step's benchmark: the contenders' records, and counted work."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import step_clip
import step_mix
import step_parts
import step_paths
import torch
import train_step
from benchmark_parts import bench as make_bench
from benchmark_parts import median, run
from llava_mix import MIX, conversation
from measuring import GB, peak_memory
from mix_lengths import DrawnMix, Length, draw_lengths, read_lengths
from PIL import Image
from step_flops import count_flops, record_flops, step_flops_on_meta, without_experts
from step_parts import SharedModel, TrainingStep, make_batch, packed, with_features

from tove_llava import build_model, load_preset
from tove_llava.core.errors import ConfigError
from tove_llava.data import ImageTransform, LlavaDataset, load_tokenizer
from tove_llava.llava.varlen import packed_rows
from tove_llava.train.recomputation import NONE, set_checkpointing

STAGE = "finetune_lora"


@pytest.fixture
def bench():
    return make_bench(batch=4, tokenizer=None, checkpointing_gib=None, execution=None)


def new_step(preset, stage=STAGE):
    return TrainingStep(build_model(preset)[0], preset.stage(stage), torch.float32)


@pytest.fixture(scope="module")
def step():
    return new_step(load_preset("tiny"))


@pytest.fixture(scope="module")
def batches(step):
    return step_mix.micro_batches(make_bench(batch=4, tokenizer=None), step.model, 4, 2)


def whole_cost(step, *sizes, **more):
    return sum(step.needed_flops(make_batch(step.model, *sizes, torch.float32, 0, **more)).values())


def test_both_contenders_get_the_same_records(batches, step):
    for batch in batches:
        real = batch.padded["attention_mask"].bool()
        assert torch.equal(batch.packed["input_ids"][0], batch.padded["input_ids"][real])
        assert real.sum(1).tolist() == batch.lengths and max(batch.lengths) == real.shape[1]
        for row, pictured in zip(batch.padded["input_ids"], batch.pictures, strict=True):
            images = int((row == step.model.config.image_token_index).sum())
            assert images == pictured * step.model.config.vision_config.num_image_tokens
        assert len(batch.packed["supervised"]) == sum(batch.supervised) and "supervised" not in batch.padded


def test_one_row_is_the_same_batch(step, monkeypatch):
    batch = make_batch(step.model, 3, 10, torch.float32, 0, supervised=4)
    monkeypatch.setitem(step.model.tower.fusion.gate._modules, "noise", None)  # two draws would differ
    padded = step.forward(batch)
    with packed_rows(step.model.model.language_model):
        torch.testing.assert_close(padded, step.forward(packed(batch)), rtol=1e-5, atol=0)


def test_the_counted_work_is_that_of_the_records(batches, step):
    """Text without an image needs no gradient of the lowest layer's input."""
    flops = record_flops(step)
    for batch in batches:
        with packed_rows(step.model.model.language_model):
            counted = sum(step.needed_flops(batch.packed).values())
        for pictured in (True, False):
            if set(batch.pictures) == {pictured}:
                work = sum(map(flops[pictured], batch.lengths, batch.supervised))
                assert work == pytest.approx(counted, rel=1e-6)
    assert any(all(batch.pictures) for batch in batches)
    assert flops[False](50, 5) < flops[True](50, 5)
    assert flops[False].fixed == pytest.approx(0, abs=1e-6 * flops[False](50, 5))


def test_work_without_experts_and_on_the_meta_device_is_that_of_a_model(bench, step, monkeypatch):
    preset, costs = load_preset("tiny"), []
    for one in (preset, without_experts(preset)):
        own = step if one is preset else new_step(one)
        costs.append(whole_cost(own, 1, 40, supervised=20))
        assert step_flops_on_meta(one, STAGE, 40, 20) == pytest.approx(costs[-1], rel=0.01)
    assert costs[1] < costs[0]
    clip = step_clip.clip_alone(bench, step.model.tower)
    monkeypatch.setitem(step.model.model._modules, "vision_tower", clip)
    assert whole_cost(step, 1, 40, supervised=20) == costs[1]


def test_checkpointing_trades_arithmetic_for_memory():
    step = new_step(load_preset("tiny"), "pretrain")
    batch = make_batch(step.model, 2, 64, torch.float32, seed=0)
    rest = with_features(batch, step.encode(batch["pixel_values"]))

    def back():
        step.optimizer.zero_grad(set_to_none=True)
        step.forward(rest).backward()

    costs = []
    for kind in (NONE, "full"):
        set_checkpointing(step.model, kind)
        costs.append((peak_memory(back, step.device), count_flops(back)))
    assert costs[1][0] < costs[0][0] and costs[1][1] > costs[0][1]  # so needed FLOPs are counted without it


def test_contenders_have_their_own_settings_and_leave_nothing_behind(bench, step, batches):
    both, language = step_mix.Contenders(bench, step, batches), step.model.model.language_model
    both.fast.kind, both.fast.execution = "selective", "concurrent"  # as on a GPU
    attention, layer = language.config._attn_implementation, language.layers[0]
    both.prepare("original")
    assert layer.gradient_checkpointing and language.config._attn_implementation == attention
    assert "context_fn" not in layer._gradient_checkpointing_func.keywords and step.model.tower.execution == "eager"
    both.prepare("ours")
    assert language.config._attn_implementation == "tove_varlen" and step.model.tower.execution == "concurrent"
    assert "context_fn" in layer._gradient_checkpointing_func.keywords
    both.close()
    assert language.config._attn_implementation == attention and not layer.gradient_checkpointing
    assert step.model.tower.execution == "eager"


def test_an_execution_that_does_not_run_is_left_unless_a_flag_names_it(bench, step, batches, monkeypatch):
    def fails(pixels):
        raise ConfigError("no graph here")

    images = [batch.packed["pixel_values"] for batch in batches if any(batch.pictures)]
    fast = step_paths.FastPath(bench, step, bench.preset.stage(STAGE))
    fast.execution = "concurrent"
    monkeypatch.setattr(step, "encode", fails)
    with fast.on(images):
        assert step.model.tower.execution == "eager" and fast.fallback == "no graph here"
    bench.args.execution = "concurrent"
    with pytest.raises(ConfigError, match="no graph"), step_paths.FastPath(bench, step, fast.stage).on(images):
        pass


class PretendedGpu(str):
    """A CPU for torch, a GPU for the benchmark."""

    type = "cuda"


@pytest.fixture
def on_gpu(bench, monkeypatch):
    """Run the GPU's part on the CPU, with made-up memory numbers."""

    def refuse(device):
        raise ConfigError("no kernels here")

    monkeypatch.setattr(bench, "device", PretendedGpu("cpu"))
    for module in (step_mix, step_paths):
        monkeypatch.setattr(module, "held_memory", lambda device: 10 * GB)
    monkeypatch.setattr(step_paths, "check_kernels", refuse)
    monkeypatch.setattr(step_mix, "peak_memory", lambda run, device: peak_memory(run, torch.device("cpu")))
    return bench


@pytest.mark.parametrize(("total", "left"), [(80, 75), (12, 0)])
def test_the_budget_is_what_is_free_between_steps(on_gpu, step, batches, monkeypatch, total, left):
    memory = SimpleNamespace(total_memory=total * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    both = step_mix.Contenders(on_gpu, step, batches)
    step.optimizer.state.clear()
    both.fit_budget()
    assert step.optimizer.state, "measured before the optimizer has its state"
    assert both.fast.budget == pytest.approx(max(0, (left - 10) * GB - step_paths.MARGIN) / 2**30, abs=0.051)
    both.close()
    both.fast.budget = 3.0
    both.fit_budget()
    assert both.fast.budget == 3.0  # as given


def test_the_memory_of_qlora_is_measured(on_gpu):
    pytest.importorskip("bitsandbytes")
    found = step_mix.measure_qlora(on_gpu, SharedModel(on_gpu, "source"))
    assert found["batch"] == 4 and found["checkpointing_gib"] == 5.0 and 10 * GB < found["peak_bytes"] < 11 * GB


def test_one_model_serves_all_stages_and_is_then_what_it_was(bench, monkeypatch):
    built = []
    monkeypatch.setattr(step_parts, "build_llava", lambda *a: built.append(1) or build_model("tiny")[0])
    shared = SharedModel(bench, "source")
    shared.model.to(torch.bfloat16)

    def state():
        kinds = {name: type(module) for name, module in shared.model.named_modules()}
        return kinds, {name: (p.dtype, p.shape) for name, p in shared.model.named_parameters()}, set(vars(shared.model))

    before = state()
    for stage in (STAGE, "pretrain", STAGE):
        with shared.step(bench.preset.stage(stage)) as step:
            assert ("lora" in step.trainable.parts) == (stage == STAGE)
            assert all(p.dtype == torch.float32 for p in step.trainable.parameters())
            step.dtype = torch.bfloat16
            step(make_batch(step.model, 1, 4, torch.bfloat16, 0, supervised=2))
        assert state() == before and all(p.grad is None for p in shared.model.parameters())
    taken = shared.take()
    assert built == [1] and shared.model is not taken and built == [1, 1]


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """Run the whole program at toy size."""
    monkeypatch.setattr(step_clip, "COUNTED", "tiny")
    for module in (step_clip, train_step):
        monkeypatch.setattr(module, "STAGES", {STAGE: (8, 4, 1.09)})
    flags = ["--repeats", "1", "--batch", "2", "--mix-batches", "1", "--mix-repeats", "2", "--text-tokens", "4"]
    return lambda *more, **keys: run(train_step, tmp_path, *flags, *more, **keys)


def test_the_whole_program(whole):
    record, page = whole("--stages", STAGE)
    mix, targets = record["mix"], {row["name"]: row for row in record["targets"]}
    rows = mix["contenders"]
    assert mix["ratio"]["value"] == pytest.approx(median(rows["original"]) / median(rows["ours"]))
    for row in rows.values():
        assert row["samples_per_second"] == pytest.approx(2 / median(row))
        assert row["achieved_tflops"] == pytest.approx(mix["needed_tflop"] / median(row))
        assert row["memory"]["peak_bytes"] > row["memory"]["resident_bytes"] > 0
    assert rows["ours"]["positions_that_are_padding"] == 0 == rows["original"]["positions"] % 2
    assert len(targets) == 6 and record["not_measured"] == {} and record["qlora"] is None
    assert {row["value"] for name, row in targets.items() if "memory" in name or name.startswith("time")} == {None}
    assert targets["samples/s over the original recipe's, tiny, LLaVA-1.5's mix"]["value"] == mix["ratio"]["value"]
    assert mix["full_length"]["positions"] == 2 * load_preset("tiny").stage(STAGE).model_max_length
    assert mix["full_length"]["peak_bytes"] > rows["ours"]["memory"]["peak_bytes"]
    assert mix["execution"] == {"ours": "eager", "original": "eager", "fallback": None}
    assert os.uname().nodename not in page and "not measured (needs a GPU)" in page


def test_a_target_without_a_value_says_why(bench):
    found = step_mix.mix_targets(bench, None, None, {f"{step_mix.MIX}: the original recipe": "it cannot"})
    assert [row["value"] for row in found] == [None] * 4
    assert [row.get("reason") for row in found] == ["it cannot", None, None, None]  # the others need a GPU


def test_llavas_own_step(whole, monkeypatch):
    """Run LLaVA's code, named by LLAVA_SRC, on the same records.

    All layers except the head have adapters.
    """
    if "LLAVA_SRC" not in os.environ:
        pytest.skip("LLAVA_SRC does not name the folder of haotian-liu/LLaVA")
    monkeypatch.setenv("PYTHONPATH", "")
    record, page = whole("--stages", STAGE)
    found, ours = record["mix"]["llava"], median(record["mix"]["contenders"]["ours"])
    assert found["adapters"] == 7 * build_model("tiny")[0].config.text_config.num_hidden_layers
    assert found["over_ours"] == pytest.approx(median(found) / ours) and "LLaVA's own code (transformers" in page


def test_the_table_of_lengths_is_the_mix():
    lengths = read_lengths()
    assert len(lengths.records) == sum(part.thousands for part in MIX) and "LLaMA" in lengths.tokenizer
    assert all(0 < record.supervised < record.tokens for record in lengths.records)
    assert sum(not record.picture for record in lengths.records) == 40
    drawn = lengths.draw(1000, 3)
    assert sorted(drawn[:664], key=repr) == sorted(lengths.records, key=repr)  # each once before any comes again
    assert lengths.draw(1000, 3) == drawn != lengths.draw(1000, 4)


def test_lengths_are_those_of_the_training_data_set(tmp_path):
    tokenizer, draw = load_tokenizer("bundled:llm"), np.random.default_rng(0)
    table, file = draw_lengths(tokenizer, seed=0, share=0.02), tmp_path / "records.json"
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    for part in MIX:
        assert part.turns[0] <= len(conversation(draw, part)) / 2 <= part.turns[1]
    draw = np.random.default_rng(0)
    assert list(table) == [part.name for part in MIX]
    for part in MIX:
        columns = table[part.name]
        image = {"image": "0.png"} if part.picture else {}
        records = [{"id": "a", "conversations": conversation(draw, part), **image} for _ in columns[0]]
        file.write_text(json.dumps(records))
        dataset = LlavaDataset(file, tmp_path, tokenizer, "v1", ImageTransform(8, "pad"), 36, 100_000)
        for index, (words, tokens, supervised) in enumerate(zip(*columns, strict=True)):
            example = dataset[index]
            assert words == sum(len(turn["value"].split()) for turn in records[index]["conversations"])
            assert tokens == int((example["input_ids"] >= 0).sum())
            assert supervised == int((example["labels"] >= 0).sum())


def test_batches_have_the_lengths_drawn(bench, step, monkeypatch):
    lengths = [Length(9, 50, 20, True), Length(9, 50, 20, False), Length(9, 400, 100, True)]
    mix = DrawnMix(lengths, 1000, 8, 36, 136)
    assert mix.modality_lengths == [9, -9, 9]
    for index, (tokens, supervised, pictures) in enumerate([(51, 20, 1), (50, 20, 0), (101, 25, 1)]):
        example = mix[index]
        assert len(example["input_ids"]) == len(example["labels"]) == tokens
        assert int((example["labels"] >= 0).sum()) == supervised and example["labels"][0] == -100
        assert int((example["input_ids"] == -200).sum()) == pictures == (example["pixel_values"] is not None)
    batch = step_mix.longest_batch(bench, step.model, 3, 120)
    assert batch.lengths == [120] * 3 and batch.padded_positions == 360 and all(batch.pictures)
    text = 120 - step.model.config.vision_config.num_image_tokens
    assert batch.supervised == [text - 1] * 3  # nothing predicts the first token
    monkeypatch.setattr(step_mix, "PICTURES", 2)
    bench.args.tokenizer = "bundled:llm"  # the mix is tokenised here
    batch = step_mix.micro_batches(bench, step.model, 2, 1)[0]
    assert len(batch.lengths) == 2 and max(batch.lengths) <= 512
