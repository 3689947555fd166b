"""What the layers keep and what they compute again: the same losses and gradients, for less memory or less work."""

import json
import sys

import pytest
import torch
from test_llava_model import make_llava
from test_packing import COLLATORS, EXAMPLES, assert_close, gradients
from torch.utils.flop_counter import FlopCounterMode
from tower_parts import text_config
from train_parts import ROOT, flags, launch, losses, write_parts, write_records

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
    if "cu_seq_lens_q" not in batch:
        return gradients(model, batch, autocast)
    with packed_rows(model.model.language_model):
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
    one_layer = LayerCosts(3, 24, 0, 0)
    assert one_layer.layers == len(model.model.language_model.layers)
    for kind, budget in [("full", None), ("selective", None), ("selective", 1e-5), ("selective", 0.0), ("none", None)]:
        set_checkpointing(model, kind, budget_gib=budget)
        output, got = run(model, batch, autocast)
        assert torch.equal(output.loss, plain.loss) and torch.equal(output.aux_loss, plain.aux_loss), kind
        assert_close(got, expected)  # in 16 bits too: what is computed again is the same


def work_and_memory(model, batch, kind, budget=None):
    """FLOPs of a backward pass, and bytes at its peak; from one more run, what stays when everything is done."""
    from measuring import peak_memory

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
    assert [costs.selective_layers(7, 2, always + 2 * 7 * extra) for extra in (0, 499, 500, 2600, 10**6)] == [
        0, 0, 1, 5, 10,
    ]  # fmt: skip
    assert costs.selective_layers(7, 2, 0) == 0
    model, few, many = model_of(tmp_path), COLLATORS[0](EXAMPLES), COLLATORS[0](EXAMPLES * 8)
    budget = 4 * few["labels"].numel() * 24 * 40 / 2**30
    few_work = [work_and_memory(model, few, "selective", b)[0] for b in (None, budget, 0.0)]
    many_work = [work_and_memory(model, many, "selective", b)[0] for b in (None, budget, 0.0)]
    assert few_work[0] == few_work[1] < few_work[2]
    assert many_work[0] < many_work[1] == many_work[2]


def test_the_kind_is_a_setting_of_the_stage(tmp_path):
    write_parts(tmp_path)
    write_records(tmp_path)
    line = flags(tmp_path, "finetune_lora", tmp_path / "out")
    assert parse(line).stage.kept == "none"
    assert parse([*line, "--gradient_checkpointing", "True"]).stage.kept == "full"
    chosen = parse([*line, "--checkpointing", "selective", "--checkpointing_gib", "30"])
    assert (chosen.stage.kept, chosen.stage.checkpointing_gib) == ("selective", 30.0)
    assert parse([*line, "--set", "stages.finetune_lora.checkpointing=full"]).stage.kept == "full"
    # The preset's own argument gives way to the flag; two flags that disagree do not pass.
    on = ["--set", "stages.finetune_lora.arguments.gradient_checkpointing=true"]
    assert parse([*line, *on, "--checkpointing", "none"]).stage.kept == "none"
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
    folder = tmp_path_factory.mktemp("recomputation")
    write_parts(folder)
    write_records(folder, pattern="iitt", count=8, captions=8)
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
    layers, chosen = [], recomputation.create_selective_checkpoint_contexts
    monkeypatch.setattr(
        recomputation, "create_selective_checkpoint_contexts", lambda policy: layers.append(policy) or chosen(policy)
    )
    if "--bits" in more:
        pytest.importorskip("bitsandbytes")
    if stage == "merge":
        assert main(line_of(root, "finetune_lora", tmp_path / "tuned", "none")) == 0
    found = {}
    for kind in KINDS:
        line = line_of(root, stage, tmp_path / kind, kind, *more)
        if stage == "merge":
            line[line.index("--pretrained") + 1] = str(tmp_path / "tuned")
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
    """Ranks whose batches differ in length choose other layers, and still gather the same weights in the same order."""
    sizes = ["--per_device_train_batch_size", "2", "--deepspeed", deepspeed]
    budget = {"none": [], "selective": [], "budget": ["--checkpointing_gib", "0.0031"]}
    lines = [
        line_of(root, "finetune_lora", tmp_path / name, "none" if name == "none" else "selective", *sizes, *more)
        for name, more in budget.items()
    ]
    file = tmp_path / "lines.json"
    file.write_text(json.dumps(lines))
    launch([str(file)], module="train_worker")
    none, *others = (torch.tensor(losses(tmp_path / name, "lm_loss", "aux_loss")) for name in budget)
    for other in others:
        torch.testing.assert_close(other, none, rtol=1e-5, atol=1e-5)
