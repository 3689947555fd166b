"""The training step's benchmark on LLaVA-1.5's mix at toy size: what is compared, and how work is counted."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from train_parts import ROOT

from tove_llava import build_model, load_preset
from tove_llava.core.errors import ConfigError
from tove_llava.data import load_tokenizer
from tove_llava.llava.varlen import packed_rows

NAMES = (
    "common", "llava_mix", "mix_lengths", "step_parts", "step_paths", "step_flops", "step_mix", "step_clip",
    "train_step",
)  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    for name in NAMES:
        sys.modules.pop(name, None)
    try:
        import step_clip
        import step_flops
        import step_mix
        import train_step

        yield step_mix, step_flops, step_clip, train_step
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bench(parts):
    from common import Bench, argument_parser

    parser = argument_parser("")
    parser.set_defaults(device="cpu", batch=4, tokenizer=None, checkpointing_gib=None, execution=None)
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
    monkeypatch.setattr(sys.modules["step_paths"], "check_kernels", refuse_kernels)
    monkeypatch.setattr(parts[0], "peak_memory", lambda run, device: peak_memory(run, torch.device("cpu")))
    return bench


def refuse_kernels(device):
    raise ConfigError("no kernels here")


@pytest.mark.parametrize(("total", "gib"), [(80, 75), (12, 0)])
def test_the_budget_is_what_is_free_between_steps(parts, on_gpu, step, batches, monkeypatch, total, gib):
    from common import GB
    from step_paths import MARGIN

    memory = SimpleNamespace(total_memory=total * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    both = parts[0].Contenders(on_gpu, step, batches)
    step.optimizer.state.clear()
    both.fit_budget()
    assert step.optimizer.state, "measured before the optimiser has its state"
    assert both.fast.budget == pytest.approx(max(0, (gib - 10) * GB - MARGIN) / 2**30, abs=0.051)
    both.prepare("ours")
    assert step.model.model.language_model.layers[0].gradient_checkpointing
    both.run("ours")
    both.close()
    both.fast.budget = 3.0
    both.fit_budget()
    assert both.fast.budget == 3.0  # as given


def test_the_memory_of_qlora_is_measured(parts, on_gpu):
    pytest.importorskip("bitsandbytes")
    from common import GB
    from step_parts import SharedModel

    found = parts[0].measure_qlora(on_gpu, SharedModel(on_gpu, "source"))
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
    for module in parts[2:]:
        monkeypatch.setattr(module, "STAGES", {"finetune_lora": (8, 4, 1.09)})
    sizes = ["--device", "cpu", "--batch", "2", "--repeats", "1", "--warmup", "1", "--mix-batches", "1"]
    flags = [*sizes, "--mix-repeats", "2", "--stages", "finetune_lora", "--output", str(tmp_path)]
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
    assert record["not_measured"] == {} and record["seconds"] > 0 and "LLaMA, 32,000 pieces" in page
    full = mix["full_length"]
    assert full["positions"] == 2 * load_preset("tiny").stage("finetune_lora").model_max_length
    assert full["peak_bytes"] > rows["ours"]["memory"]["peak_bytes"]
    assert mix["execution"] == {"ours": "eager", "original": "eager", "fallback": None}
    assert record["beside_clip"]["finetune_lora"]["time"]["checkpointing"] == "none"
    assert os.uname().nodename not in page


@pytest.fixture
def brief(parts, tmp_path, monkeypatch):
    """Runs the program at toy size; returns its exit code, record and page."""
    monkeypatch.setattr(parts[2], "COUNTED", "tiny")
    for module in parts[2:]:
        monkeypatch.setattr(module, "STAGES", {"finetune_lora": (8, 4, 1.09)})
    sizes = ["--device", "cpu", "--batch", "2", "--repeats", "1", "--warmup", "0", "--text-tokens", "4"]
    mix = ["--mix-batches", "1", "--mix-repeats", "1", "--stages", "pretrain,finetune_lora"]

    def run(*flags):
        code = parts[3].main([*sizes, *mix, "--output", str(tmp_path), *flags])
        file = tmp_path / "train_step-tiny-cpu.json"
        return code, json.loads(file.read_text()), file.with_suffix(".md").read_text()

    return run


def test_a_part_that_fails_leaves_the_others(parts, brief, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(parts[0], "_full_length", no_memory)
    monkeypatch.setattr(parts[2], "packed", no_memory)
    measure_stage = parts[3].measure_stage
    monkeypatch.setattr(parts[3], "measure_stage", lambda *a: no_memory() if a[2] == "pretrain" else measure_stage(*a))
    code, record, page = brief()
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    parts_lost = ("stage pretrain", "memory of LoRA", "finetune_lora beside CLIP alone")
    assert code == 1 and record["not_measured"] == dict.fromkeys(parts_lost, reason)
    assert list(record["stages"]) == ["finetune_lora"] and record["mix"]["ratio"]["value"] > 0
    assert record["mix"]["full_length"] is None and record["beside_clip"]["finetune_lora"]["time"] is None
    assert record["beside_clip"]["finetune_lora"]["flops"]["value"] > 1
    assert all(f"| {part} | {reason} |" in page for part in parts_lost)


def test_a_contender_that_fails_leaves_the_other(parts, brief, monkeypatch):
    run = parts[0].Contenders.run

    def broken(self, name, batches=None):
        if name == "original":
            raise ConfigError("it cannot")
        run(self, name, batches)

    monkeypatch.setattr(parts[0].Contenders, "run", broken)
    code, record, page = brief("--stages", "finetune_lora")
    assert code == 1 and record["not_measured"] == {"the mix: the original recipe, restated": "it cannot"}
    assert list(record["mix"]["contenders"]) == ["ours"] and record["mix"]["ratio"] is None
    speed = next(row for row in record["targets"] if row["name"].startswith("samples/s"))
    assert speed["value"] is None and speed["reason"] == "it cannot" and "not measured (it cannot)" in page


def test_what_was_measured_is_on_disk_when_the_program_is_ended(parts, brief, monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(parts[3], "measure_mix", interrupted)
    with pytest.raises(KeyboardInterrupt):
        brief()
    record = json.loads((tmp_path / "train_step-tiny-cpu.json").read_text())
    assert list(record["stages"]) == ["pretrain", "finetune_lora"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenizer", "/no/such/folder"], "no tokenizer folder"),
        (["--mix-batches", "0"], "--mix-batches must be at least 1"),
        (["--mix-repeats", "0"], "--mix-repeats must be at least 1"),
        (["--execution", "eagre"], "unknown execution 'eagre'"),
        (["--text-tokens", "1"], "--text-tokens must be at least 2"),
    ],
)
def test_flags_are_checked_before_anything_is_built(parts, monkeypatch, tmp_path, capsys, flags, message):
    monkeypatch.setattr(sys.modules["step_parts"], "build_llava", lambda *a: pytest.fail("a model was built"))
    assert parts[3].main(["--device", "cpu", "--output", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_one_model_serves_all_stages_and_is_then_what_it_was(parts, bench, monkeypatch):
    from step_parts import SharedModel, make_batch

    built = []
    monkeypatch.setattr(sys.modules["step_parts"], "build_llava", lambda *a: built.append(1) or build_model("tiny")[0])
    shared = SharedModel(bench, "source")
    shared.model.to(torch.bfloat16)
    kinds = {name: type(module) for name, module in shared.model.named_modules()}
    dtypes = {name: (p.dtype, p.shape) for name, p in shared.model.named_parameters()}
    attributes = set(vars(shared.model))
    for stage in ("finetune_lora", "pretrain", "finetune_lora"):
        with shared.step(bench.preset.stage(stage)) as step:
            assert ("lora" in step.trainable.parts) == (stage == "finetune_lora")
            assert all(p.dtype == torch.float32 for p in step.trainable.parameters())
            step.dtype = torch.bfloat16
            step(make_batch(step.model, 1, 4, torch.bfloat16, 0, supervised=2))
        assert {name: type(module) for name, module in shared.model.named_modules()} == kinds
        assert {name: (p.dtype, p.shape) for name, p in shared.model.named_parameters()} == dtypes
        assert set(vars(shared.model)) == attributes and all(p.grad is None for p in shared.model.parameters())
    taken = shared.take()
    assert built == [1] and shared.model is not taken and built == [1, 1]


def test_clip_alone_costs_what_a_preset_without_experts_costs(parts, bench, step):
    """It is timed on the model with the hub."""
    from step_parts import TrainingStep, make_batch

    alone = parts[1].without_experts(load_preset("tiny"))
    other = TrainingStep(build_model(alone)[0], alone.stage("finetune_lora"), torch.float32)
    hub = step.model.tower

    def cost(one):
        return one.needed_flops(make_batch(one.model, 1, 8, torch.float32, 0, supervised=4))

    whole = cost(step)
    step.model.model.vision_tower = parts[2].clip_alone(bench, hub)
    try:
        assert cost(step) == cost(other)
    finally:
        step.model.model.vision_tower = hub
    assert cost(step) == whole != cost(other)


def test_one_row_is_the_same_batch(parts, step):
    from step_parts import make_batch, packed

    batch = make_batch(step.model, 3, 10, torch.float32, 0, supervised=4)
    step.model.tower.fusion.gate.noise, noise = None, step.model.tower.fusion.gate.noise  # its draw would differ
    try:
        losses = [step.forward(batch)]
        with packed_rows(step.model.model.language_model):
            losses.append(step.forward(packed(batch)))
    finally:
        step.model.tower.fusion.gate.noise = noise
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_the_hub_is_timed_on_the_fast_path_and_the_original_keeps_its_own(parts, bench, step, batches):
    """As on a GPU: selective checkpointing, the tower's execution made before the clock starts."""
    from step_parts import SharedModel

    both = parts[0].Contenders(bench, step, batches)
    both.fast.kind, both.fast.execution = "selective", "concurrent"
    encoded = []
    encode, step.encode = step.encode, lambda pixels: encoded.append(len(pixels)) or encode(pixels)
    try:
        both.prepare("ours")
        assert step.model.tower.execution == "concurrent" and encoded
        contexts = step.model.model.language_model.layers[0]._gradient_checkpointing_func.keywords
        assert "context_fn" in contexts and not contexts["use_reentrant"]
        both.prepare("original")
        assert step.model.tower.execution == "eager"
        assert "context_fn" not in step.model.model.language_model.layers[0]._gradient_checkpointing_func.keywords
        both.prepare("ours")
        both.close()
        assert step.model.tower.execution == "eager"
    finally:
        step.encode = encode
    shared, seen = SharedModel(bench, "source"), []
    model = shared.model
    forward = model.forward

    def watched(*args, **kwargs):
        implementation = model.model.language_model.config._attn_implementation
        seen.append((implementation, tuple(model.tower.active_experts), "attention_mask" in kwargs))
        return forward(*args, **kwargs)

    model.forward = watched
    bench.args.mix_repeats = 1
    parts[2].measure_beside_clip(bench, shared, "finetune_lora")
    names = tuple(entry["name"] for entry in load_preset("tiny").vision.experts)
    assert {which for _, which, _ in seen} == {names, ()}
    assert {(how, mask) for how, _, mask in seen} == {("tove_varlen", False)}
    assert tuple(model.tower.active_experts) == names


def test_an_execution_that_does_not_run_here_is_left_unless_it_was_asked_for(parts, bench, step, batches):
    from step_paths import FastPath

    def fails(pixels):
        raise ConfigError("no graph here")

    pictures = [batch.packed["pixel_values"] for batch in batches if any(batch.pictures)]
    fast = FastPath(bench, step, bench.preset.stage("finetune_lora"))
    fast.execution = "concurrent"
    encode, step.encode = step.encode, fails
    try:
        with fast.on(pictures):
            assert step.model.tower.execution == "eager" and fast.fallback == "no graph here"
        bench.args.execution = "concurrent"
        with pytest.raises(ConfigError, match="no graph"), FastPath(bench, step, fast.stage).on(pictures):
            pass
    finally:
        step.encode, bench.args.execution = encode, None


def test_the_table_of_lengths_is_the_mix(parts):
    from llava_mix import MIX
    from mix_lengths import read_lengths

    lengths = read_lengths()
    assert len(lengths.records) == sum(part.thousands for part in MIX) and "LLaMA" in lengths.tokenizer
    assert all(0 < record.supervised < record.tokens for record in lengths.records)
    text_only = sum(not record.picture for record in lengths.records)
    assert text_only == 40 and all((record.modality < 0) != record.picture for record in lengths.records)
    drawn = lengths.draw(1000, 3)
    assert sorted(drawn[:664], key=repr) == sorted(lengths.records, key=repr)  # each once before any comes again
    assert lengths.draw(1000, 3) == drawn != lengths.draw(1000, 4)


def test_lengths_are_those_of_the_training_data_set(parts, tmp_path):
    """With a tokenizer that is at hand: what the command counts, against the data set's own examples."""
    from llava_mix import MIX, conversation
    from mix_lengths import draw_lengths

    from tove_llava.data import ImageTransform, LlavaDataset

    tokenizer, draw = load_tokenizer("bundled:llm"), np.random.default_rng(0)
    table = draw_lengths(tokenizer, seed=0, share=0.02)
    assert list(table) == [part.name for part in MIX]
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    for part in MIX:
        columns = table[part.name]
        records = [{"id": "a", "conversations": conversation(draw, part)} for _ in columns[0]]
        for record in records if part.picture else []:
            record["image"] = "0.png"
        (tmp_path / "records.json").write_text(json.dumps(records))
        dataset = LlavaDataset(
            tmp_path / "records.json", tmp_path, tokenizer, "v1", ImageTransform(8, "pad"), 36, 100_000
        )
        for index, (words, tokens, supervised) in enumerate(zip(*columns, strict=True)):
            example = dataset[index]
            assert words == sum(len(turn["value"].split()) for turn in records[index]["conversations"])
            assert tokens == int((example["input_ids"] >= 0).sum())
            assert supervised == int((example["labels"] >= 0).sum())


def test_examples_have_the_lengths_drawn(parts, step):
    from mix_lengths import DrawnMix, Length

    lengths = [Length(9, 50, 20, True), Length(9, 50, 20, False), Length(9, 400, 100, True)]
    mix = DrawnMix(lengths, 1000, 8, 36, 136)
    assert mix.modality_lengths == [9, -9, 9]
    for index, (tokens, supervised, pictures) in enumerate([(51, 20, 1), (50, 20, 0), (101, 25, 1)]):
        example = mix[index]
        assert len(example["input_ids"]) == len(example["labels"]) == tokens
        assert int((example["labels"] >= 0).sum()) == supervised and example["labels"][0] == -100
        assert int((example["input_ids"] == -200).sum()) == pictures == (example["pixel_values"] is not None)


def test_a_batch_of_full_length_is_the_most_there_can_be(parts, bench, step):
    batch = parts[0].longest_batch(bench, step.model, 3, 120)
    assert batch.lengths == [120] * 3 and batch.padded_positions == 360 and all(batch.pictures)
    text = 120 - step.model.config.vision_config.num_image_tokens
    assert batch.supervised == [text - 1] * 3  # all but the first token, which none predicts


def test_the_mix_may_be_tokenised_here(parts, bench, step, monkeypatch):
    monkeypatch.setattr(parts[0], "PICTURES", 2)
    bench.args.tokenizer = "bundled:llm"
    try:
        batch = parts[0].micro_batches(bench, step.model, 2, 1)[0]
    finally:
        bench.args.tokenizer = None
    assert len(batch.lengths) == 2 and max(batch.lengths) <= 512


def test_llavas_own_step_stands_beside_ours(parts, brief, monkeypatch):
    """Its code, where LLAVA_SRC names it: the same records, adapters on every layer of LLaMA but its head."""
    if "LLAVA_SRC" not in os.environ:
        pytest.skip("LLAVA_SRC does not name the folder of haotian-liu/LLaVA")
    monkeypatch.setenv("PYTHONPATH", "")
    code, record, page = brief("--stages", "finetune_lora")
    assert code == 0, record["not_measured"]
    found, mix = record["mix"]["llava"], record["mix"]
    language = build_model("tiny")[0].config.text_config
    lora = load_preset("tiny").stage("finetune_lora").lora
    assert found["adapters"] == 7 * language.num_hidden_layers and found["trained"] > 7 * lora.r
    assert found["samples_per_second"] == pytest.approx(2 / found["wall_seconds"]["median"])
    ours = mix["contenders"]["ours"]["wall_seconds"]["median"]
    assert found["over_ours"] == pytest.approx(found["wall_seconds"]["median"] / ours)
    speed = next(row for row in record["targets"] if row["name"].startswith("samples/s"))
    assert speed["value"] == found["over_ours"] and "LLaVA's own code (transformers" in page


def test_llavas_own_step_that_does_not_run_is_told(parts, brief, monkeypatch, tmp_path):
    monkeypatch.setenv("LLAVA_SRC", str(tmp_path))
    code, record, _ = brief("--stages", "finetune_lora")
    assert code == 1 and "ended with exit code 1" in record["not_measured"]["LLaVA's own step"]
    speed = next(row for row in record["targets"] if row["name"].startswith("samples/s"))
    assert record["mix"]["llava"] is None and speed["value"] == record["mix"]["ratio"]["value"]
