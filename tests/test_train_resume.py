"""A killed and restarted run ends like an uninterrupted one.

A finished run is not touched.
"""

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
from safetensors.torch import save_file
from train_killed import train_until_killed
from train_parts import flags, launch, losses, weights, write_inputs

from tove_llava.core.errors import CheckpointError
from tove_llava.train import step_checkpoints as checkpoints
from tove_llava.train.arguments import parse
from tove_llava.train.run import main, run
from tove_llava.train.stages import Trainable

# Dropout, noise, two epochs, and logs that span checkpoints: all that a resumed run could get wrong.
SCHEDULE = ["--num_train_epochs", "2", "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("resume"))


def lora(root, output, *more):
    return flags(root, "finetune_lora", output, "--lora_dropout", "0.2", *SCHEDULE, *more)


def merging(root, output, *more):
    """Merge into adapters of CLIP, with losses other than the defaults."""
    start = root / "merge-start"
    if not start.exists():
        assert main(flags(root, "pretrain", start, "--max_steps", "2")) == 0
    options = ["--merge_loss", "smooth_l1", "--merge_token_weights", "transfer", "--merge_lora_r", "2"]
    return flags(root, "merge", output, "--pretrained", str(start), *options, *SCHEDULE, *more)


@pytest.fixture(scope="module")
def whole(root):
    assert main(lora(root, root / "whole")) == 0
    return root / "whole"


TERMS = ("step", "lm_loss", "aux_loss", "merge_loss", "learning_rate")


def assert_same_run(output, whole):
    torch.testing.assert_close(*(torch.tensor(losses(o, *TERMS)) for o in (output, whole)), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(output), weights(whole), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("moment", "last"), [("between", 4), ("publishing", 2), ("writing", 2)])
def test_killed_run_ends_where_the_whole_one_does(root, whole, moment, last, capsys):
    output = root / moment
    train_until_killed(moment, lora(root, output))
    assert [path.name for path in checkpoints.complete(output)][-1] == f"checkpoint-{last}"
    assert bool(checkpoints.incomplete(output)) == (moment != "between")
    assert not (output / "tove_llava.json").exists()

    assert main(lora(root, output)) == 0
    said = capsys.readouterr().out
    assert f"resuming from {output / f'checkpoint-{last}'}" in said
    assert ("its save was interrupted" in said) == (moment != "between")
    assert_same_run(output, whole)
    assert not checkpoints.incomplete(output)
    assert [path.name for path in checkpoints.complete(output)] == ["checkpoint-8"]  # save_total_limit is 1


def test_killed_run_of_weighted_files_ends_where_the_whole_one_does(root, capsys):
    mix = ["--data_path", f"{root / 'instruct.json'}:0.5,{root / 'captions.json'}"]
    mix += ["--num_train_epochs", "3", "--per_device_train_batch_size", "4"]
    assert main(lora(root, root / "mix", *mix)) == 0
    train_until_killed("between", lora(root, root / "mix-killed", *mix))
    assert main(lora(root, root / "mix-killed", *mix)) == 0
    assert "resuming from" in capsys.readouterr().out
    assert_same_run(root / "mix-killed", root / "mix")
    with pytest.raises(CheckpointError, match="data_path: .*instruct.json:0.5,"):
        run(parse(lora(root, root / "mix")))


@pytest.mark.parametrize("ranks", [1, 2])
def test_plain_order_is_resumed_within_a_later_epoch(ranks):
    # Earlier versions used this order too.
    order = torch.randperm(16, generator=torch.Generator().manual_seed(7 + 2)).tolist()
    for rank in range(ranks):
        loader = torch.utils.data.DataLoader(range(16), 2, sampler=SeedableRandomSampler(range(16), data_seed=7))
        options = {"put_on_device": False, "use_seedable_sampler": True, "data_seed": 7}
        loader = prepare_data_loader(loader, None, ranks, rank, **options)
        resumed = skip_first_batches(loader, 1)
        resumed.set_epoch(2)
        batches = [order[start : start + 2] for start in range(0, 16, 2)]
        assert [batch.tolist() for batch in resumed] == batches[rank::ranks][1:]


def test_run_killed_before_its_model_is_saved_only_saves(root, whole, capsys):
    output = root / "saving"
    train_until_killed("saving", lora(root, output))
    assert main(lora(root, output)) == 0
    assert "only saving was left to do" in capsys.readouterr().out
    assert_same_run(output, whole)


def test_finished_run_is_reused_and_other_settings_are_refused_by_key(root, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    for more in ([], ["--logging_steps", "1"]):
        assert main(lora(root, whole, *more)) == 0
        assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before
    with pytest.raises(CheckpointError, match=r"arguments\.learning_rate: 0\.01 there, 0\.003 now"):
        run(parse(lora(root, whole, "--learning_rate", "0.003")))
    with pytest.raises(CheckpointError, match=r"vision\.router_aux_loss_coef"):
        run(parse(lora(root, whole, "--set", "vision.router_aux_loss_coef=0.1")))


def test_stage_two_notices_that_stage_one_was_trained_again(root):
    stage1, output = root / "stage1", root / "stage2"
    assert main(flags(root, "pretrain", stage1, "--max_steps", "1")) == 0
    arguments = flags(root, "finetune_lora", output, "--max_steps", "1", "--pretrained", str(stage1))
    assert main(arguments) == 0
    for path in stage1.iterdir():
        path.unlink()
    assert main(flags(root, "pretrain", stage1, "--max_steps", "2")) == 0
    with pytest.raises(CheckpointError, match="pretrained_fingerprint"):
        run(parse(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
@pytest.mark.parametrize("stage", [lora, merging], ids=["lora", "merge"])
def test_killed_ranks_resume_under_deepspeed(root, deepspeed, stage):
    arguments = ["--per_device_train_batch_size", "2", "--deepspeed", deepspeed]
    name = f"{deepspeed}-{stage.__name__}"
    uninterrupted, output = root / f"{name}-whole", root / f"{name}-killed"
    launch(stage(root, uninterrupted, *arguments))
    with pytest.raises(AssertionError):  # the launcher reports the killed rank
        launch(["between", *stage(root, output, *arguments)], module="train_killed")
    assert [path.name for path in checkpoints.complete(output)][-1] == "checkpoint-4"
    assert "resuming from" in launch(stage(root, output, *arguments))
    assert_same_run(output, uninterrupted)


@pytest.mark.parametrize(("damage", "word"), [("half", "cannot be loaded"), ("nan", "NaN or infinity")])
def test_damaged_parameters_of_a_step_are_named(tmp_path, damage, word):
    layer, file = torch.nn.Linear(4, 4), tmp_path / "trainable.safetensors"
    if damage == "nan":
        layer.weight.data[1, 2] = torch.nan
    save_file(layer.state_dict(), file)
    if damage == "half":
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(CheckpointError, match=rf"trainable\.safetensors.*{word}|{word}.*trainable\.safetensors"):
        checkpoints.load_weights(file, Trainable({"projector": dict(layer.named_parameters())}))
