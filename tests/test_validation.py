"""The loss on held-out records and scores of benchmarks while a run trains, and the best model."""

import json

import pytest
import torch
from answer_parts import make_scenes
from test_data_sets import place
from train_parts import flags, launch, losses, weights, write_inputs

from tove_llava import cli, load_model
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


def answering(data, *more):
    words = ["--eval_benchmarks", "scenes,pope", "--eval_data_root", str(data), "--eval_benchmarks_limit", "5"]
    return [*words, "--per_device_eval_batch_size", "2", *more]


@pytest.fixture(scope="module")
def data(root):
    make_scenes(root / "data")
    return place("pope", root / "data")


def texts(folder):
    return {
        name: {row["question_id"]: row["text"] for row in map(json.loads, (folder / name / answers).open())}
        for name, answers in (("scenes", "answers.jsonl"), ("pope", "answers.jsonl"))
    }


def evaluated(model, data, output):
    """Answer the same questions with a trained model's folder; return its answers, and its scores."""
    words = ["--benchmark", "scenes,pope", "--data-root", str(data), "--limit", "5", "--output", str(output)]
    assert cli.main(["eval", "--model", str(model), *words, "--dtype", "float32"]) == 0
    found = json.loads((output / "results.json").read_text())["benchmarks"]
    for name in found:
        (output / name / "full" / "answers.jsonl").rename(output / name / "answers.jsonl")
    return texts(output), {name: result["full"]["rows"] for name, result in found.items()}


@pytest.mark.parametrize(
    "more", [pytest.param([], marks=pytest.mark.slow), ["--padding_free", "True", "--checkpointing", "full"]]
)
def test_benchmarks_are_answered_as_by_eval_and_training_stays_the_same(root, data, tmp_path, capsys, more):
    assert main(lora(root, tmp_path / "plain", *more)) == 0
    words = answering(data, "--eval_steps", "1", "--eval_on_start", "True", *more)
    assert cli.main(["train", *lora(root, tmp_path / "run", *words)]) == 0
    assert "step 2 of 3: scenes 0.0; pope 100.0" in capsys.readouterr().out
    assert losses(tmp_path / "plain", "loss", "lm_loss") == losses(tmp_path / "run", "loss", "lm_loss")
    plain, run = weights(tmp_path / "plain"), weights(tmp_path / "run")
    assert all(torch.equal(plain[name], run[name]) for name in plain)

    found, scores = evaluated(tmp_path / "run", data, tmp_path / "eval")
    assert texts(tmp_path / "run" / "benchmarks" / "step-3") == found and len(found["scenes"]) == 5
    assert texts(tmp_path / "run" / "benchmarks" / "step-0") != found
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in log if "eval_pope" in entry]
    assert [entry["step"] for entry in logged] == [0, 1, 2, 3] and not (tmp_path / "run" / "best").exists()
    assert logged[-1]["eval_scenes"] == scores["scenes"]["overall"][0]
    assert logged[-1]["eval_scenes/left_of"] == scores["scenes"]["left_of"][0] and logged[-1]["eval_pope"] == 100


@pytest.mark.slow
def test_two_ranks_share_the_questions(root, data, tmp_path):
    more = ["--eval_steps", "3", "--lora_dropout", "0", "--deepspeed", "zero2"]
    launch(["train", *lora(root, tmp_path / "two", *held_out(root), *answering(data), *more)], module="tove_llava")
    assert texts(tmp_path / "two" / "benchmarks" / "step-3") == evaluated(tmp_path / "two", data, tmp_path / "eval")[0]
    assert measurements(tmp_path / "two")[3] == pytest.approx(mean_loss(root, tmp_path / "two"), rel=1e-4)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--eval_benchmarks", "scenes,popo"], "Did you mean 'pope'"),
        (["--eval_benchmarks", "gqa"], "the data of benchmark 'gqa' is not there"),
        (["--eval_benchmarks", "mmvet"], "needs a judge"),
        (["--eval_benchmarks", "scenes", "--eval_benchmarks_limit", "0"], "--eval_benchmarks_limit must be at least 1"),
        (["--eval_benchmarks", "scenes", "--deepspeed", "zero3"], "does not run under ZeRO-3"),
        (["--eval_benchmarks", "scenes", "--keep_best", "True"], "--keep_best needs held-out records"),
        (["--eval_benchmarks_limit", "5"], "--eval_benchmarks_limit needs benchmarks: --eval_benchmarks"),
    ],
)
def test_benchmarks_are_refused_before_weights_are_loaded(root, data, tmp_path, capsys, monkeypatch, words, message):
    place("mmvet", root / "data")
    monkeypatch.setattr("tove_llava.train.run._make_model", lambda *_: pytest.fail("loads weights"))
    if "zero3" in words:
        monkeypatch.setenv("WORLD_SIZE", "1")
    where = ["--eval_data_root", str(data)] if "--eval_benchmarks" in words else []
    assert cli.main(["train", *lora(root, tmp_path / "run", *words, *where)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


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
