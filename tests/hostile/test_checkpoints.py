"""Damaged checkpoint folders of every kind: right result or an error of ours, in bounded time and memory."""

import shutil
import sys

import pytest
import torch
from convert_world import logits as question_logits
from hostile.checkpoint_mutations import mutate
from hostile.invariant import Case, attempt, describe
from safetensors.torch import load_file, save_file
from stage_parts import logits

from tove_llava import load_model, load_tower, open_llava
from tove_llava.core.errors import CheckpointError, ToveError

KINDS = ("full", "lora", "stage1", "tower", "llava-hf", "original", "original-lora")


@pytest.fixture(scope="module")
def folders(kinds, world, tmp_path_factory):
    tower = tmp_path_factory.mktemp("hostile") / "tower"
    load_tower(kinds / "stage1").save_pretrained(tower)
    own = {name: kinds / name for name in ("full", "lora", "stage1")}
    return own | {"tower": tower, "llava-hf": world.hf, "original": world.whole, "original-lora": world.lora}


def use(kind, folder, base):
    """Load a folder in every way that its kind has, and compute with the model."""
    if kind == "tower":
        tower = load_tower(folder)
        tower(torch.zeros(1, 3, tower.config.image_size, tower.config.image_size))
    elif kind in ("full", "lora", "stage1"):
        model, processor = load_model(folder)
        logits(model)
        processor.tokenizer("two words")
        load_tower(folder)
    else:
        question_logits(open_llava(folder, base=base if kind == "original-lora" else None)[0])
        if kind == "llava-hf":
            load_model(folder, keep_stock=True)


def call(kind, folder, base):
    """Use a folder as a command would: its exit code, and the message on standard error."""
    try:
        use(kind, folder, base)
    except ToveError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def faults(kind, folders, base, seeds, tmp_path):
    """Return the faults of each seed's damage."""
    use(kind, folders[kind], base)  # imports everything once
    found, codes = [], set()
    for seed in seeds:
        folder = shutil.copytree(folders[kind], tmp_path / "folder")
        what = f"seed {seed}, {mutate(folder, seed)}"
        case = Case(lambda folder=folder: call(kind, folder, base), (str(folder),), lambda out: None, tmp_path, what)
        outcome = attempt(case)
        codes.add(outcome.code)
        if outcome.faults:
            found.append(describe(case, outcome))
        shutil.rmtree(folder)
    assert {0, 2} <= codes  # else the damage is always fatal, or never has an effect
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_is_right_or_refused(kind, folders, world, tmp_path):
    assert faults(kind, folders, str(world.base), range(8), tmp_path) == []


@pytest.mark.parametrize("kind", ["full", "tower", "llava-hf"])
def test_a_weight_that_is_not_finite_is_refused(kind, folders, world, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / "folder")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for tensor in tensors.values():
            tensor.view(-1)[:1] = torch.nan
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        use(kind, folder, str(world.base))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_folders(kind, folders, world, tmp_path):
    assert faults(kind, folders, str(world.base), range(8, 220), tmp_path) == []
