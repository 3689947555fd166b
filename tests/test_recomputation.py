"""Checkpointed layers give equal losses and gradients, for less memory or work."""

import json
import sys
from contextlib import nullcontext

import pytest
import torch
from test_llava_model import make_llava
from test_packing import COLLATORS, EXAMPLES, assert_close, gradients
from torch.utils.flop_counter import FlopCounterMode
from tower_parts import text_config
from train_parts import ROOT, flags, launch, losses, write_inputs

from tove_llava import load_preset
from tove_llava.core.errors import ConfigError
from tove_llava.llava.varlen import packed_rows
from tove_llava.presets import LoraPreset, StagePreset
from tove_llava.train import recomputation
from tove_llava.train.arguments import parse
from tove_llava.train.recomputation import KINDS, LayerCosts, set_checkpointing
from tove_llava.train.run import main
from tove_llava.train.stages import freeze

sys.path.insert(0, str(ROOT / "benchmarks"))

from measuring import peak_memory  # noqa: E402

LORA = StagePreset("lora", "v1", lora=LoraPreset(r=4, alpha=8, dropout=0.3))


def model_of(folder, train="lora", layers=3):
    model = make_llava(folder, text=text_config(num_hidden_layers=layers)).train()
    if train == "lora":
        freeze(model, LORA)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def run(model, batch, autocast=False):
    with packed_rows(model.model.language_model) if "cu_seq_lens_q" in batch else nullcontext():
        return gradients(model, batch, autocast)


@pytest.mark.parametrize("train", ["lora", "all"])
@pytest.mark.parametrize(
    ("packed", "dtype"), [(False, "float32"), (True, "float32"), (True, "autocast"), (True, "bfloat16")]
)
def test_losses_and_gradients_do_not_depend_on_what_is_kept(tmp_path, train, packed, dtype):
    model, batch = model_of(tmp_path, train), COLLATORS[packed](EXAMPLES)
    autocast = dtype == "autocast"
    if dtype == "bfloat16":
        model.to(torch.bfloat16)
        batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    plain, expected = run(model, batch, autocast)
    assert any("lora" in name for name in expected) == (train == "lora")
    for kind, budget in [("full", None), ("selective", None), ("selective", 1e-5), ("selective", 0.0), ("none", None)]:
        set_checkpointing(model, kind, budget_gib=budget)
        output, got = run(model, batch, autocast)
        assert torch.equal(output.loss, plain.loss) and torch.equal(output.aux_loss, plain.aux_loss), kind
        assert_close(got, expected)  # in 16 bits too: what is computed again is the same


def work_and_memory(model, batch, kind, budget=None):
    """Return a backward pass's FLOPs, and its peak bytes from another run."""
    set_checkpointing(model, kind, budget_gib=budget)
    loss = model(**batch).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    model.zero_grad()
    return counter.get_total_flops(), peak_memory(lambda: model(**batch).loss.backward(), torch.device("cpu"))


def test_selective_recomputes_little_and_keeps_little(tmp_path):
    model = model_of(tmp_path, layers=6)
    batch = COLLATORS[0]([*EXAMPLES] * 6)
    costs = {kind: work_and_memory(model, batch, kind) for kind in KINDS}
    (least, most), (half, some), (double, little) = costs["none"], costs["selective"], costs["full"]
    assert least < half < least + 0.2 * (double - least)  # what is left are the adapters' narrow products
    assert little < some < most
    work, memory = work_and_memory(model, batch, "selective", budget=0.0)
    assert work == double and memory == pytest.approx(little, rel=0.02)


def test_a_budget_chooses_layers_by_the_length_of_the_batch(tmp_path):
    costs = LayerCosts(layers=10, hidden=100, products=500, whole=1000)
    assert costs.selective_layers(7, 2, None) == 10
    always = 2 * 7 * (10 * 100 + 2 * 1000)
    for extra, layers in {0: 0, 499: 0, 500: 1, 2600: 5, 10**6: 10}.items():
        assert costs.selective_layers(7, 2, always + 2 * 7 * extra) == layers
    assert costs.selective_layers(7, 2, 0) == 0
    model, few, many = model_of(tmp_path), COLLATORS[0](EXAMPLES), COLLATORS[0](EXAMPLES * 8)
    budget = 4 * few["labels"].numel() * 24 * 40 / 2**30
    few, many = ([work_and_memory(model, x, "selective", b)[0] for b in (None, budget, 0.0)] for x in (few, many))
    assert few[0] == few[1] < few[2] and many[0] < many[1] == many[2]


def test_the_kind_is_a_setting_of_the_stage(tmp_path):
    line = flags(write_inputs(tmp_path), "finetune_lora", tmp_path / "out")
    on = ["--set", "stages.finetune_lora.arguments.gradient_checkpointing=true"]
    for words, kept in [
        ([], "none"),
        (["--gradient_checkpointing", "True"], "full"),
        (["--checkpointing", "selective", "--checkpointing_gib", "30"], "selective"),
        (["--set", "stages.finetune_lora.checkpointing=full"], "full"),
        ([*on, "--checkpointing", "none"], "none"),  # the preset's argument gives way to the flag
    ]:
        stage = parse([*line, *words]).stage
        assert stage.kept == kept and stage.checkpointing_gib == (30.0 if "30" in words else None)
    for wrong, message in [
        (["--checkpointing", "some"], "none, full, selective"),
        (["--checkpointing", "none", "--gradient_checkpointing", "True"], "give one of them"),
        (["--checkpointing", "full", "--checkpointing_gib", "3"], "selective"),
        (["--checkpointing", "selective", "--checkpointing_gib", "-1"], "negative"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse([*line, *wrong])
    assert load_preset("vicuna-7b").stage("finetune_lora").checkpointing is None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("recomputation"), pattern="iitt", count=8, captions=8)
    assert main(flags(folder, "pretrain", folder / "stage1", "--max_steps", "1")) == 0
    return folder


def line_of(root, stage, output, kind, *more):
    return flags(
        root, stage, output, "--pretrained", str(root / "stage1"), "--max_steps", "2", "--checkpointing", kind,
        "--padding_free", "True", "--lora_dropout" if stage == "finetune_lora" else "--weight_decay", "0.1", *more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "more", "tolerance"),
    [
        ("finetune_lora", [], 1e-6),
        ("finetune_lora", ["--bits", "4"], 1e-6),
        ("finetune_lora", ["--bf16", "True"], 1e-3),
        ("finetune", ["--bf16", "True"], 1e-3),
        ("merge", [], 1e-6),
    ],
    ids=["lora", "qlora", "lora-bf16", "full-bf16", "merge"],
)
def test_a_run_learns_the_same(root, tmp_path, monkeypatch, stage, more, tolerance):
    layers, name = [], "create_selective_checkpoint_contexts"
    chosen = getattr(recomputation, name)
    monkeypatch.setattr(recomputation, name, lambda policy: layers.append(policy) or chosen(policy))
    if "--bits" in more:
        pytest.importorskip("bitsandbytes")
    found = {}
    for kind in KINDS:
        line = line_of(root, stage, tmp_path / kind, kind, *more)
        layers.clear()
        assert main(line) == 0
        assert len(layers) == (kind == "selective") * 2 * 2  # layers, steps
        found[kind] = torch.tensor(losses(tmp_path / kind, "lm_loss", "aux_loss"))
    assert len(found["none"]) == 2 and not torch.equal(found["none"][0], found["none"][1])
    for kind in KINDS:
        torch.testing.assert_close(found[kind], found["none"], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_ranks_learn_the_same(root, tmp_path, deepspeed):
    """Ranks with unequal batches choose other layers, yet gather in one order."""
    sizes = ["--per_device_train_batch_size", "2", "--deepspeed", deepspeed]
    runs = {"none": ["none"], "selective": ["selective"], "budget": ["selective", "--checkpointing_gib", "0.0031"]}
    lines = [line_of(root, "finetune_lora", tmp_path / name, *more, *sizes) for name, more in runs.items()]
    file = tmp_path / "lines.json"
    file.write_text(json.dumps(lines))
    launch([str(file)], module="train_worker")
    none, *others = (torch.tensor(losses(tmp_path / name, "lm_loss", "aux_loss")) for name in runs)
    for other in others:
        torch.testing.assert_close(other, none, rtol=1e-5, atol=1e-5)
