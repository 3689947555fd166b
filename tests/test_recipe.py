"""The vicuna presets against LLaVA-1.5's published recipe, and the trainer's settings."""

import itertools
import json
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from data_helpers import SAMPLE
from torch import nn
from train_parts import ROOT, flags, write_inputs

from tove_llava.cli.launch import trainer_flags
from tove_llava.data import LengthGroupedSampler
from tove_llava.presets import load_preset
from tove_llava.train.arguments import parse
from tove_llava.train.run import make_dataset, make_trainer
from tove_llava.train.run_settings import DEEPSPEED_FOLDER
from tove_llava.train.stages import freeze
from tove_llava.train.start import STARTS
from tove_llava.train.trainer import ToveTrainer

STAGES = {"pretrain.sh": "pretrain", "finetune.sh": "finetune", "finetune_lora.sh": "finetune_lora"}
STEPS = 130  # of the schedule that is looked at; 0.03 of them are not whole

# Rows that no preset holds, and why.
NOT_HELD = {
    "Data": "named on the command line",
    "Image start/end tokens, patch token": "off in the original, and there are none here",
    "Attention": "torch's own instead of FlashAttention-2: the same mathematics",
}


def table(file: Path, first: str) -> dict[str, dict[str, str]]:
    """Read the Markdown table that begins with ``first``: {row: {column: cell}}.

    "same" is written out.
    """
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in file.read_text("utf-8").splitlines()]
    start = next(index for index, cells in enumerate(lines) if cells[0] == first)
    rows = {}
    for name, *values in itertools.takewhile(lambda cells: len(cells) > 1, lines[start + 2 :]):
        for index, value in enumerate(values):
            values[index] = values[index - 1] if value == "same" else value
        rows[name] = dict(zip(lines[start][1:], values, strict=True))
    return rows


@pytest.fixture(params=["conformance", "own sample"])
def recipe(request: pytest.FixtureRequest) -> Path:
    own = request.param == "own sample"
    return (SAMPLE if own else request.getfixturevalue("conformance") / "llava") / "recipe.md"


@dataclass(frozen=True)
class Run:
    """A preset's stage, and its trainer over small parts."""

    preset: Any
    stage: Any
    trainer: ToveTrainer
    script: str

    @property
    def starts_from_stage_1(self) -> bool:
        """Tell if the script's verb, ``launch``, starts the stage from stage 1."""
        stage = self.script.split("verb launch ")[1].split()[0]
        words = [*trainer_flags(self.preset.name, stage), "--pretrained", ""]
        return words[words.index("--pretrained") + 1] == str(Path("outputs", self.preset.name, "pretrain"))

    @property
    def given(self) -> dict[str, Any]:
        return self.stage.arguments

    @property
    def args(self) -> Any:
        return self.trainer.args

    @cached_property
    def schedule(self) -> list[float]:
        """Return every group's share of its rate, at each step."""
        optimizer = self.trainer.create_optimizer()
        scheduler = self.trainer.create_scheduler(STEPS, optimizer)
        shares = []
        for _ in range(STEPS):
            share = optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["initial_lr"]
            assert all(group["lr"] == pytest.approx(share * group["initial_lr"]) for group in optimizer.param_groups)
            shares.append(share)
            optimizer.step()
            scheduler.step()
        return shares


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("recipe"))


def make_run(root: Path, name: str, script: str, *more: str) -> Run:
    """Apply the preset's settings and further flags to small similar parts."""
    small = yaml.safe_load((root / "preset.yaml").read_text())
    file = root / f"{name}.yaml"
    vision = {key: small["vision"][key] for key in ("clip", "experts", "projection_dim")} | {"image_size": 32}
    file.write_text(yaml.safe_dump({"extends": name, "vision": vision, "language": small["language"]}))
    more = ("--preset", str(file), "--tf32", "False", "--report_to", "none", *more)
    settings = parse(flags(root, STAGES[script], root / "out", *more))
    start = STARTS.get(settings.stage.starts_from)(settings.preset, settings.stage, None)
    dataset, model = make_dataset(settings, start.processor, start.vision), start.model(42)
    parts = (model, start.processor, dataset, freeze(model, start.stage))
    trainer = make_trainer(settings, settings.training_arguments(), *parts)
    preset = load_preset(name)
    return Run(preset, preset.stage(STAGES[script]), trainer, (ROOT / "scripts" / script).read_text())


def number(text: str) -> float:
    found = re.match(r"-?[\d.,]+(?:e-?\d+)?", text)
    assert found, f"no number in {text!r}"
    return float(found.group().replace(",", ""))


def none_or_number(text: str) -> float | None:
    return None if text.startswith(("none", "-")) else number(text)


def trained(cell: str) -> set[str]:
    words = {"projector": "projector", "language model": "language model", "LoRA matrices": "lora"}
    return {words[part.strip()] for part in cell.removesuffix(" only").split("+")}


def check_projector(cell: str, run: Run) -> None:
    assert cell.startswith("mlp2x_gelu")
    projector = run.trainer.model.model.multi_modal_projector
    assert [type(m) for m in (projector.linear_1, projector.linear_2)] == [nn.Linear, nn.Linear]
    assert run.preset.projector.hidden_act == "gelu" and projector.linear_1.bias is not None


def check_lora(cell: str, run: Run) -> None:
    if cell == "-":
        assert run.stage.lora is None
        return
    rank, alpha, dropout, bias = (part.split()[0] for part in cell.split("/"))
    lora = run.stage.lora
    assert (lora.r, lora.alpha, lora.dropout, lora.bias) == (number(rank), number(alpha), number(dropout), bias)


def check_warm_up(cell: str, run: Run) -> None:
    steps = math.ceil(number(cell) * STEPS)  # linear from 0
    assert run.schedule[: steps + 1] == pytest.approx([step / steps for step in range(steps + 1)])


def check_saving(cell: str, run: Run) -> None:
    """As many checkpoints are kept; they are written more often, so that a crash costs less."""
    every, keep = (number(part.strip()) for part in cell.split("/"))
    assert run.given["save_total_limit"] == keep and run.given["save_steps"] == 500 < every


def check_schedule(cell: str, run: Run) -> None:
    assert cell == "cosine"
    warm_up = math.ceil(0.03 * STEPS)
    for step in range(warm_up, STEPS):
        progress = (step - warm_up) / (STEPS - warm_up)
        assert run.schedule[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * progress)))


def check_optimiser(cell: str, run: Run) -> None:
    beta1, beta2, eps = (float(x) for x in re.search(r"betas ([\d.]+)/([\d.]+), eps ([\de.-]+)", cell).groups())
    optimizer = run.trainer.create_optimizer()
    optimizer = getattr(optimizer, "optimizer", optimizer)
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["betas"] == (beta1, beta2) and group["eps"] == eps for group in optimizer.param_groups)


def zero_file(name: str) -> dict[str, Any]:
    return json.loads((DEEPSPEED_FOLDER / f"{name}.json").read_text())


def equal(read: Any, value: Any) -> Any:
    """Return a check that a cell, once read, is the run's value."""

    def check(cell: str, run: Run) -> None:
        assert read(cell) == value(run)

    return check


CHECKS = {
    # The published scripts are for 13B.
    "Language model": equal(
        lambda cell: f"hf:{cell}",
        lambda run: run.preset.language.source.replace(run.preset.name.removeprefix("vicuna-"), "13b"),
    ),
    "Vision tower": equal(lambda cell: f"hf:{cell}", lambda run: run.preset.vision.clip),
    "Conversation version": equal(str, lambda run: run.stage.template),
    "Starts from projector": equal(lambda cell: cell.startswith("stage-1"), lambda run: run.starts_from_stage_1),
    "What trains": equal(trained, lambda run: set(run.trainer._trainable.parts) - {"tower"}),
    "Projector": check_projector,
    "Vision feature layer": equal(number, lambda run: run.preset.vision.clip_layer),
    "Image aspect ratio": equal(
        lambda cell: "square" if "`square`" in cell else cell,
        lambda run: run.trainer._records.image_transform.aspect_ratio,
    ),
    "Grouped by modality and length": equal(
        lambda cell: cell.startswith("yes"),
        lambda run: isinstance(run.trainer._get_train_sampler(), LengthGroupedSampler),
    ),
    "LoRA rank / alpha / dropout / bias": check_lora,
    "Learning rate": equal(number, lambda run: run.args.learning_rate),
    "Separate projector learning rate": equal(none_or_number, lambda run: run.stage.projector_learning_rate),
    "Batch per device": equal(number, lambda run: run.args.per_device_train_batch_size),
    "Gradient accumulation": equal(number, lambda run: run.args.gradient_accumulation_steps),
    "Global batch": equal(
        number, lambda run: 8 * run.args.per_device_train_batch_size * run.args.gradient_accumulation_steps
    ),
    "Epochs": equal(number, lambda run: run.args.num_train_epochs),
    "Weight decay": equal(number, lambda run: run.args.weight_decay),
    "Warm-up": check_warm_up,
    "Schedule": check_schedule,
    "Optimiser": check_optimiser,
    # What the note below the table concludes: the published DeepSpeed files clip nothing.
    "Gradient clipping": equal(lambda cell: 0, lambda run: run.args.max_grad_norm),
    "Precision": equal(
        lambda cell: ("bf16" in cell, "TF32 on" in cell), lambda run: (run.args.bf16, run.given["tf32"])
    ),
    "Max length": equal(number, lambda run: run.trainer._records.model_max_length),
    "Gradient checkpointing": equal(lambda cell: cell == "yes", lambda run: run.given["gradient_checkpointing"]),
    "DeepSpeed": equal(
        lambda cell: number(cell.removeprefix("ZeRO-")),
        lambda run: zero_file(run.stage.deepspeed)["zero_optimization"]["stage"],
    ),
    "Save every / keep": check_saving,
    "Eval during training": equal(lambda cell: cell == "none", lambda run: run.args.eval_strategy == "no"),
    "Data loader workers": equal(number, lambda run: run.args.dataloader_num_workers),
    "Seed": equal(number, lambda run: run.args.seed),
}


def base_name(row: str) -> str:
    """Return a row's name without the remark in parentheses."""
    return row.partition(" (")[0]


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[tuple[str, str], Run]:
    return {(name, script): make_run(root, name, script) for name in ("vicuna-7b", "vicuna-13b") for script in STAGES}


@pytest.mark.parametrize("name", ["vicuna-7b", "vicuna-13b"])
@pytest.mark.parametrize("script", STAGES)
def test_every_row_of_the_table(recipe: Path, runs: dict[tuple[str, str], Run], name: str, script: str) -> None:
    rows = table(recipe, "Setting")
    assert len(rows) > 20
    for row, cells in rows.items():
        if base_name(row) not in NOT_HELD:
            CHECKS[base_name(row)](cells[script], runs[name, script])


def test_the_samples_agree(conformance: Path) -> None:
    golden = {base_name(row): cells for row, cells in table(conformance / "llava" / "recipe.md", "Setting").items()}
    own = {base_name(row) for row in table(SAMPLE / "recipe.md", "Setting")}
    assert own <= set(golden) <= {*CHECKS, *NOT_HELD} and set(CHECKS) <= set(golden)


# --- parameters and their groups --------------------------------------------------------------------------------------

# The original's names, and ours. Ours has a tower too, and a language model of two layers.
NAMES = {
    "base_model.model.": "",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "lm_head.": "lm_head.",
    "model.": "model.language_model.",
}


def renamed(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    old = next(prefix for prefix in NAMES if name.startswith(prefix))
    return NAMES[old] + name.removeprefix(old)


def groups_of(run: Run) -> dict[tuple[float, float], set[str]]:
    """Return {(rate, decay): names}, without the tower and the second layer."""
    names = {id(p): name for name, p in run.trainer.model.named_parameters()}
    groups: dict[tuple[float, float], set[str]] = {}
    for group in run.trainer._groups:
        members = {names[id(p)] for p in group["params"]}
        members = {name for name in members if ".vision_tower." not in name and ".layers.1." not in name}
        if members:
            groups.setdefault((group["lr"], group["weight_decay"]), set()).update(members)
    return groups


@pytest.mark.parametrize(
    ("script", "key"),
    [("pretrain.sh", "stage1"), ("finetune.sh", "stage2_full"), ("finetune_lora.sh", "stage2_lora")],
)
def test_trainable_parameters_and_groups(conformance: Path, root: Path, script: str, key: str) -> None:
    golden = json.loads((conformance / "llava" / "parameter_names.json").read_text())[key]
    run = make_run(root, "vicuna-7b", script, "--weight_decay", "0.1")  # as there, to tell the decayed ones apart
    expected: dict[tuple[float, float], set[str]] = {}
    for group in golden["optimizer_groups"]:
        decay = 0.1 if group["weight_decay"] == "args.weight_decay" else 0.0
        if group["names"]:
            expected.setdefault((group["lr"], decay), set()).update(renamed(name) for name in group["names"])
    assert groups_of(run) == expected
    everything = {name for names in expected.values() for name in names}
    trained = {name for name, p in run.trainer.model.named_parameters() if p.requires_grad}
    assert {n for n in trained if ".vision_tower." not in n and ".layers.1." not in n} == everything
    if key == "stage1":
        assert everything == {renamed(name) for name in golden["trainable"]}
    if key == "stage2_lora":
        targets = {name.split(".")[-4] for name in everything if ".lora_" in name}
        assert targets == set(golden["target_modules"])


# --- DeepSpeed's files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_zero_files(name: str) -> None:
    row = table(SAMPLE / "recipe.md", "DeepSpeed file")[name]
    config = zero_file(name)
    zero = config["zero_optimization"]
    for key in ("stage", "overlap_comm", "contiguous_gradients", "reduce_bucket_size"):
        assert str(zero[key]).lower() == row[key]
    offloaded = {key: zero.get(key, {}).get("device") for key in ("offload_optimizer", "offload_param")}
    assert set(offloaded.values()) == {None if row["offload"] == "-" else "cpu"}
    # Without clipping in the published files: "auto" is the preset's max_grad_norm, which is 0.
    assert config["gradient_clipping"] == "auto"


@pytest.mark.skipif("LLAVA_SRC" not in os.environ, reason="LLAVA_SRC names no checkout of haotian-liu/LLaVA")
@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_zero_files_against_the_originals(name: str) -> None:
    theirs = json.loads((Path(os.environ["LLAVA_SRC"]) / "scripts" / f"{name}.json").read_text())
    ours = zero_file(name)
    assert theirs["bf16"] == ours["bf16"] and theirs["fp16"] == ours["fp16"]
    expected = dict(theirs["zero_optimization"])
    expected.pop("sub_group_size")  # 1e9 is DeepSpeed's own value
    if "gather_16bit_weights_on_model_save" in expected:  # the older name
        expected["stage3_gather_16bit_weights_on_model_save"] = expected.pop("gather_16bit_weights_on_model_save")
    assert ours["zero_optimization"] == expected
