"""A signal ends a run at once while it loads, and with a checkpoint while it trains."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from train_parts import flags, launch, launch_torch, losses, weights, write_inputs
from train_signalled import train_in_fork

from tove_llava.train import interrupts, run
from tove_llava.train.run import main
from tove_llava.train.run_files import complete

# Two epochs of four steps.
SCHEDULE = ["--num_train_epochs", "2", "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "3"]
TERMS = ("step", "lm_loss", "aux_loss", "learning_rate")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("interrupts"))


def lora(root, output, *more):
    return flags(root, "finetune_lora", output, "--lora_dropout", "0.2", *SCHEDULE, *more)


@pytest.fixture(scope="module")
def whole(root):
    assert main(lora(root, root / "whole")) == 0
    return root / "whole"


def assert_same_run(output, whole):
    torch.testing.assert_close(*(torch.tensor(losses(o, *TERMS)) for o in (output, whole)), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(output), weights(whole), rtol=0, atol=1e-6)


# In an epoch's first step the random state of the step before is gone: the run ends one step later.
@pytest.mark.parametrize(("step", "saved"), [(3, 3), (4, 5), (6, 6)])
def test_signalled_run_saves_and_ends_where_the_whole_one_does(root, whole, step, saved, capfd):
    output = root / f"signalled-{step}"
    assert train_in_fork(lora(root, output), step, signal.SIGTERM) == 128 + signal.SIGTERM
    assert [path.name for path in complete(output)][-1] == f"checkpoint-{saved}"
    said = capfd.readouterr().err
    assert f"saved {output / f'checkpoint-{saved}'}; the same command goes on with step {saved + 1} of 8" in said
    assert not (output / "tove_llava.json").exists()

    assert main(lora(root, output)) == 0
    assert f"resuming from {output / f'checkpoint-{saved}'}" in capfd.readouterr().out
    assert_same_run(output, whole)


def test_signal_in_the_last_step_lets_the_run_finish(root, whole, capfd):
    output = root / "last"
    assert train_in_fork(lora(root, output), 8, signal.SIGINT) == 0
    assert_same_run(output, whole)
    out = capfd.readouterr().out
    assert "step 1 of 8: loss" in out and "step 8 of 8: loss" in out  # although only each third is logged
    assert f"saved {output} after 8 steps, loss " in out and f"tove-llava chat --model {output}" in out


def test_second_ctrl_c_kills_at_once_but_a_repeated_one_does_not(root, monkeypatch):
    output = root / "twice"
    assert train_in_fork(lora(root, output), 1, signal.SIGINT, signal.SIGINT) == 130
    assert [path.name for path in complete(output)] == ["checkpoint-1"]
    monkeypatch.setattr(interrupts, "SAME", 0.1)
    assert train_in_fork(lora(root, root / "killed"), 1, signal.SIGINT, signal.SIGINT, pause=1.0) == 130
    assert not complete(root / "killed")


def test_signal_before_training_ends_at_once(root, capfd):
    code = train_in_fork(lora(root, root / "early"), 1, signal.SIGTERM, owner=run, name="make_trainer")
    assert code == 143 and not complete(root / "early")
    assert "training had not begun" in capfd.readouterr().err
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert main(["--preset", "no"]) == 2
    assert before == {number: signal.getsignal(number) for number in before}


def test_ctrl_c_of_a_terminal_spares_the_workers_that_read_images(root, whole, capfd):
    output = root / "terminal"
    arguments = lora(root, output, "--dataloader_num_workers", "2")
    assert train_in_fork(arguments, 3, signal.SIGINT, send=os.killpg) == 130
    assert train_in_fork(arguments, 3, signal.SIGTERM, send=os.killpg) == 143  # in the sixth step, after a resumption
    assert "Traceback" not in capfd.readouterr().err
    assert [path.name for path in complete(output)] == ["checkpoint-6"]
    assert main(arguments) == 0
    assert_same_run(output, whole)


def ranks(root, deepspeed):
    """Write the command lines of a whole run and of one that a signal interrupts; return their file and folders."""
    outputs = [root / f"{deepspeed}-{name}" for name in ("whole", "signalled")]
    more = ["--deepspeed", deepspeed, "--per_device_train_batch_size", "2"]
    file = root / f"{deepspeed}.json"
    file.write_text(json.dumps([lora(root, output, *more) for output in outputs]))
    return str(file), *outputs


def test_ranks_end_together_and_resume(root):
    file, uninterrupted, output = ranks(root, "none")
    launch_torch([file], "train_signalled")
    assert_same_run(output, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_ranks_end_together_and_resume_under_deepspeed(root, deepspeed):
    file, uninterrupted, output = ranks(root, deepspeed)
    assert "resuming from" in launch([file], module="train_signalled")
    assert_same_run(output, uninterrupted)


def test_watching_ends_while_a_forked_process_lives():
    """A data worker that outlives the run holds copies of all its files."""
    with interrupts.watching():
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
    try:
        assert child.is_alive() and interrupts.noted() == 0
    finally:
        child.kill()
