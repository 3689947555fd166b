"""Every flag of transformers does something, or is refused before weights are loaded."""

import json

import pytest
from train_parts import flags, losses, write_inputs

from tove_llava.core.errors import ConfigError
from tove_llava.train import run as run_module
from tove_llava.train.argument_rules import FIXED, HONOURED, REFUSED, argument_defaults, check_arguments
from tove_llava.train.run import main


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("arguments"), captions=9, count=9)


def test_every_argument_of_this_transformers_is_in_one_table():
    """A new field fails here: try what it does in a run, and put it into the table that is true of it."""
    tables = [set(HONOURED), set(FIXED), set(REFUSED)]
    assert set(argument_defaults()) <= set().union(*tables)
    assert sum(map(len, tables)) == len(set().union(*tables))


def other(default):
    """Return a value that is not the default."""
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int | float) else "other"


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & argument_defaults().keys()))
def test_an_argument_without_effect_is_refused_unless_it_has_its_default(name):
    default = argument_defaults()[name]
    check_arguments({name: default}, [name])
    with pytest.raises(ConfigError) as caught:
        check_arguments({name: other(default)}, [name])
    assert f"--{name} " in str(caught.value) and REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_argument_takes_its_one_value(name):
    right, why = FIXED[name]
    check_arguments({name: right}, [name])
    with pytest.raises(ConfigError, match=why):
        check_arguments({name: not right}, [name])


def test_a_launcher_s_own_local_rank_is_taken(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    check_arguments({"local_rank": 3}, ["local_rank"])
    with pytest.raises(ConfigError, match="LOCAL_RANK"):
        check_arguments({"local_rank": 2}, ["local_rank"])


def test_an_argument_in_no_table_is_refused(monkeypatch):
    monkeypatch.delitem(REFUSED, "debug")
    with pytest.raises(ConfigError, match="does not know"):
        check_arguments({"debug": "underflow_overflow"}, ["debug"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--resume_from_checkpoint out/checkpoint-5", "the same command resumes"),
        ("--label_smoothing_factor 0.1", "cross-entropy"),
        ("--do_predict", "tove-llava eval"),
        ("--push_to_hub", "nothing is uploaded"),
        ("--fsdp full_shard", "--deepspeed zero3"),
        ("--deepspeed zero2", "tove-llava launch pretrain"),
        ("--local_rank 3", "LOCAL_RANK"),
        ("--fp16 True", "CPU"),
        ("--seed -1", "seed must be from 0"),
        ("--learning_rate nan", "learning_rate must be a number from 0"),
        ("--warmup_steps nan", "warmup_steps"),
        ("--num_train_epochs 0", "num_train_epochs"),
        ("--max_steps 0", "max_steps"),
        ("--logging_steps -1", "logging_steps"),
        ("--adam_beta1 1.5", "adam_beta1"),
        ("--adam_beta2 1", "adam_beta2 must be from 0 to below 1"),
        ("--data_seed -1", "data_seed must be from 0"),
        ("--report_to wandbb", "--report_to wandbb: unknown"),
        ("--save_strategy best", "--keep_best"),
        ("--save_strategy epoch --save_steps 3", "--save_strategy steps"),
        ("--project mine", "--report_to trackio"),
        ("--eval_strategy steps", "--eval_data_path"),
        ("--eval_data_path {root}/captions.json --eval_strategy steps", "--eval_steps N"),
        ("--eval_data_path {root}/captions.json --eval_strategy no", "nothing is evaluated"),
        ("--per_device_eval_batch_size 3", "--eval_data_path"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "--eval_data_path"),
        ("--lr_scheduler_type cosine_with_min_lr", "min_lr"),
        ('--lr_scheduler_kwargs {{"foo":1}}', "foo"),
        ("--lr_scheduler_kwargs {{", "training arguments"),
        ('--lr_scheduler_type constant --lr_scheduler_kwargs {{"foo":1}}', "no effect"),
        ("--optim adamw_torch_xla", "--optim adamw_torch_xla"),
        ("--optim_args foo=1", "no effect with --optim"),
        ("--optim_args foo", "--optim_args foo"),
        ("--optim sgd --adam_beta1 0.8", "--adam_beta1 has no effect with --optim sgd"),
        ("--dataloader_num_workers -1", "num_workers"),
        ("--dataloader_persistent_workers True", "persistent_workers"),
        ("--dataloader_prefetch_factor 2", "prefetch_factor"),
        ("--dataloader_drop_last True --per_device_train_batch_size 10", "9 records do not fill a batch of 10"),
        ("--projector_learning_rate nan", "projector_learning_rate"),
        ("--model_max_length 0", "model_max_length"),
        ("--stage finetune_lora --lora_r 0", "r must be at least 1"),
        ("--stage finetune_lora --lora_alpha 0", "alpha must be above 0"),
        ("--stage finetune_lora --lora_dropout 1.5", "dropout must be from 0"),
        ("--stage merge --merge_lora_r -1", "r must be at least 1"),
        ("--stage merge --merge_coefficient nan", "coefficient"),
        ("--stage merge --merge_optimizer other", "merge optimizer"),
        ("--stage merge --merge_optimizer muon --optim sgd", "AdamW"),
        ("--set stages.pretrain.train=other", "freezing policy"),
        ("--set stages.pretrain.arguments.num_train_epochs=one", "num_train_epochs"),
        ("--set stages.pretrain.arguments.learning_rate=null", "learning_rate is empty"),
        ("--set stages.pretrain.arguments.optim=other", "invalid choice"),
    ],
)
def test_a_value_that_fails_later_is_refused_before_weights_are_loaded(
    root, tmp_path, capsys, monkeypatch, words, message
):
    monkeypatch.setattr(run_module, "_make_model", lambda *_: pytest.fail("loads weights"))
    assert main([*flags(root, "pretrain", tmp_path / "out"), *words.format(root=root).split()]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def plain(root):
    assert main(flags(root, "pretrain", root / "plain", "--max_steps", "3")) == 0
    return root / "plain"


def logs(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize(
    "words",
    [
        "--optim sgd",
        "--adam_beta2 0.5",
        "--weight_decay 0.5",
        "--max_grad_norm 0.001",
        "--warmup_steps 2",
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":0.009}',
        "--data_seed 7",
        "--dataloader_drop_last True",
        "--neftune_noise_alpha 5",
        "--set stages.pretrain.arguments.learning_rate=1e-3",  # YAML reads a text
    ],
)
def test_an_honoured_flag_changes_training(root, plain, tmp_path, words):
    assert main([*flags(root, "pretrain", tmp_path / "out", "--max_steps", "3"), *words.split()]) == 0
    assert losses(tmp_path / "out", "loss") != losses(plain, "loss")


def test_honoured_flags_change_logs_only(root, plain, tmp_path):
    words = ["--include_num_input_tokens_seen", "True", "--skip_memory_metrics", "False", "--logging_steps", "2"]
    held_out = ["--eval_data_path", str(root / "captions.json"), "--eval_strategy", "steps", "--eval_steps", "1"]
    delayed = ["--eval_delay", "2", "--logging_first_step", "False", "--max_steps", "3"]
    assert main([*flags(root, "pretrain", tmp_path / "out"), *words, *held_out, *delayed]) == 0
    found = logs(tmp_path / "out")
    assert [entry["step"] for entry in found if "eval_loss" in entry] == [2, 3]
    steps = {entry["step"]: entry for entry in found if "lm_loss" in entry}
    assert list(steps) == [2, 3] and steps[3]["num_input_tokens_seen"] > steps[2]["num_input_tokens_seen"] > 0
    assert "train_mem_cpu_alloc_delta" in found[-1]
    assert steps[3]["loss"] == next(entry["loss"] for entry in logs(plain) if entry["step"] == 3)
