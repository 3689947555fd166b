"""The loss on held-out records while a run trains, and the best model."""

import json

import pytest
import torch
from train_parts import flags, launch, losses, weights, write_inputs

from tove_llava import load_model
from tove_llava.data import ImageTransform, LlavaCollator, LlavaDataset
from tove_llava.train.run import main


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Records, and nine held-out ones, some without an image: a batch of four and two ranks do not divide them."""
    folder = write_inputs(tmp_path_factory.mktemp("validation"), captions=9, pattern="iti", count=9)
    assert main(flags(folder, "pretrain", folder / "stage1", "--max_steps", "1")) == 0
    return folder


def lora(root, output, *more):
    words = [
        "--pretrained",
        str(root / "stage1"),
        "--max_steps",
        "3",
        "--lora_dropout",
        "0.3",
        "--learning_rate",
        "0.05",
    ]
    return flags(root, "finetune_lora", output, *words, *more)


def held_out(root, *more):
    return ["--eval_data_path", str(root / "instruct.json"), "--per_device_eval_batch_size", "4", *more]


@pytest.fixture(scope="module")
def measured(root):
    assert main(lora(root, root / "measured", *held_out(root, "--eval_steps", "1"))) == 0
    return root / "measured"


def measurements(output):
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}


def test_training_is_the_same_with_and_without(root, measured):
    assert main(lora(root, root / "plain")) == 0
    assert losses(root / "plain", "loss", "lm_loss", "aux_loss") == losses(measured, "loss", "lm_loss", "aux_loss")
    plain, with_it = weights(root / "plain"), weights(measured)
    assert plain.keys() == with_it.keys() and all(torch.equal(plain[name], with_it[name]) for name in plain)


def mean_loss(root, folder):
    """The mean over all supervised tokens by torch's own cross-entropy, one record at a time."""
    model, processor = load_model(folder)
    vision = model.config.vision_config
    transform = ImageTransform(vision.image_size, "pad", mean=vision.image_mean, std=vision.image_std)
    records = LlavaDataset(
        root / "instruct.json", root / "images", processor.tokenizer, "v1", transform,
        num_image_tokens=vision.num_image_tokens, model_max_length=400,
    )  # fmt: skip
    collate = LlavaCollator(processor.tokenizer.pad_token_id, processor.image_token_id, vision.num_image_tokens)
    given = ("input_ids", "attention_mask", "pixel_values")
    total = count = 0
    for index in range(len(records)):
        batch = collate([records[index]])
        with torch.no_grad():
            logits = model(**{key: batch[key] for key in given if key in batch}).logits
        labels = batch["labels"][:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count


def test_the_loss_is_the_mean_over_supervised_tokens_and_the_best_model_has_it(root, measured):
    found = measurements(measured)
    assert list(found) == [1, 2, 3]
    assert found[3] == pytest.approx(mean_loss(root, measured), rel=1e-5)
    assert min(found.values()) == pytest.approx(mean_loss(root, measured / "best"), rel=1e-5)
    state = json.loads((measured / "trainer_state.json").read_text())
    assert state["best_metric"] == min(found.values()) == found[state["best_global_step"]]


def test_a_worse_model_does_not_replace_the_best(root, tmp_path):
    """With too large a learning rate the second step is worse."""
    more = held_out(root, "--eval_steps", "1")
    assert (
        main(
            [
                *lora(root, tmp_path / "run", *more),
                "--learning_rate",
                "0.5",
                "--lr_scheduler_type",
                "constant",
                "--max_steps",
                "2",
            ]
        )
        == 0
    )
    found = measurements(tmp_path / "run")
    assert found[2] > found[1] == pytest.approx(mean_loss(root, tmp_path / "run" / "best"), rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "run").glob("best*")) == ["best"]


def test_once_an_epoch_by_default_and_a_best_model_only_if_wished(root, tmp_path, capsys):
    words = ["--keep_best", "False", "--max_steps", "5"]
    assert main([*lora(root, tmp_path / "run", *held_out(root)), *words]) == 0
    assert list(measurements(tmp_path / "run")) == [3, 5] and not (tmp_path / "run" / "best").exists()
    assert "step 3 of 5: held-out loss" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_two_ranks_measure_what_one_does(root, tmp_path, deepspeed):
    more = ["--eval_steps", "3", "--lora_dropout", "0", "--deepspeed"]
    launch([*lora(root, tmp_path / "two", *held_out(root)), *more, deepspeed])
    found = measurements(tmp_path / "two")
    assert found[3] == pytest.approx(mean_loss(root, tmp_path / "two"), rel=1e-4)
    assert found[3] == pytest.approx(mean_loss(root, tmp_path / "two" / "best"), rel=1e-4)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--eval_steps", "2"], "--eval_steps needs held-out records: --eval_data_path"),
        (["--eval_strategy", "steps"], "--eval_strategy needs held-out records"),
        (["--eval_data_path", "absent.json"], "--eval_data_path absent.json does not exist"),
        (["--eval_data_path", "{root}/preset.yaml"], "preset.yaml"),
    ],
)
def test_bad_input(root, tmp_path, capsys, words, message):
    assert main([*lora(root, tmp_path / "run"), *(word.format(root=root) for word in words)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
