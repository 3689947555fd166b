"""Loss terms and gradients are the global batch's, for any split.

Text-only ranks are included.
"""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tower_calls_child import count
from train_parts import flags, launch, launch_torch, losses, weights, write_inputs, write_records

from tove_llava import load_model
from tove_llava.data import ImageTransform, LlavaCollator, LlavaDataset
from tove_llava.train import trainer
from tove_llava.train.run import main
from tove_llava.train.window import Window, draw_noise

# Plain gradient descent: after a few steps the weights differ as soon as any gradient does.
DESCENT = ["--optim", "sgd", "--learning_rate", "0.3", "--lr_scheduler_type", "constant"]
TEXT_HEAVY = ["--data_path", "{root}/text_heavy.json", "--group_by_modality_length", "False", "--template", "v1"]
MERGE_OPTIONS = ["--merge_loss", "smooth_l1", "--merge_token_weights", "transfer", "--merge_lora_r", "2"]
FURTHER = ["--merge_images_per_record", "2", "--learning_rate", "1e-6"]
PADDING_FREE = ["--padding_free", "True"]  # what lies in one row changes nothing

# name -> (stage, further flags, (batch, accumulation) of one rank, and of each of two ranks)
SCENARIOS = {
    "pretrain": ("pretrain", ["--max_steps", "3"], (8, 1), (4, 1)),
    "lora": ("finetune_lora", ["--max_steps", "3", "--group_by_modality_length", "False"], (8, 1), (2, 2)),
    # Micro-batches of one record: ranks, micro-batches and whole windows without an image.
    "pretrain-text": ("pretrain", ["--max_steps", "4", *TEXT_HEAVY], (4, 1), (1, 2)),
    "lora-text": ("finetune_lora", ["--max_steps", "4", *TEXT_HEAVY], (4, 1), (1, 2)),
    # By losses that are not the default ones, into adapters; the next is by the default's into CLIP's own weights.
    "merge-text": (
        "merge",
        ["--max_steps", "4", *MERGE_OPTIONS, *TEXT_HEAVY],
        (4, 1),
        (1, 2),
    ),
    "merge-further": ("merge", ["--max_steps", "3", *FURTHER, *TEXT_HEAVY], (4, 1), (1, 2)),
    "full-text": ("finetune", ["--max_steps", "4", "--gradient_checkpointing", "True", *TEXT_HEAVY], (4, 1), (1, 2)),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("global_batch"))
    write_records(folder / "text", captions=0, pattern="ttittttt")
    (folder / "text" / "instruct.json").rename(folder / "text_heavy.json")
    assert main(flags(folder, "pretrain", folder / "stage1", "--max_steps", "2")) == 0
    return folder


def command(root, name, output, split, *more):
    stage, extra, *_ = SCENARIOS[name]
    extra = [part.format(root=root) for part in extra]
    if stage != "pretrain":
        extra += ["--pretrained", str(root / "stage1")]
    batch, accumulation = split
    sizes = ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
    return flags(root, stage, output, *DESCENT, *sizes, *extra, *more)


@pytest.fixture(scope="module")
def single(root):
    """The outcomes of one process, which takes the whole batch at once."""
    for name, (*_, whole, _split) in SCENARIOS.items():
        assert main(command(root, name, root / f"single-{name}", whole)) == 0
    return {name: outcome(root / f"single-{name}") for name in SCENARIOS}


def outcome(output):
    return torch.tensor(losses(output, "lm_loss", "aux_loss", "merge_loss")), weights(output)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_scenarios_exercise_what_they_should(single, root):
    for name, (terms, tensors) in single.items():
        assert len({round(float(x), 5) for x in terms[:, 0]}) > 1, name
        merges = name.startswith("merge")
        assert terms[:, 1 + merges].max() > 1e-4, f"{name}: no {'merge' if merges else 'balance'} loss"
        moved = "encoder.layers.0.mlp.fc1.weight" if merges else "model.vision_tower.fusion.output.weight"
        before = load_file(root / "clip" / "model.safetensors")[moved] if merges else 0.0
        assert (tensors[moved] - before).abs().max() > 0, name
    records = json.loads((root / "text_heavy.json").read_text())
    assert sum("image" in r for r in records) == 2  # of 16: some windows of 4 have no image at all


@pytest.mark.parametrize("split", [(4, 1), (1, 4)])
def test_loss_and_gradient_are_those_of_the_mean_over_supervised_tokens(root, tmp_path, split):
    """Compare with torch's own loss: a factor that all runs share is invisible when runs are compared."""
    records = json.loads((root / "captions.json").read_text())[:4]
    (tmp_path / "four.json").write_text(json.dumps(records))
    exact = [
        "--max_steps",
        "1",
        "--tower_learning_rate",
        "0.3",
        "--set",
        "vision.noisy_gating=False",
        "--data_path",
        str(tmp_path / "four.json"),
    ]
    still = ["--learning_rate", "0", "--tower_learning_rate", "0"]
    assert main(command(root, "pretrain", tmp_path / "moved", split, *exact)) == 0
    assert main(command(root, "pretrain", tmp_path / "still", split, *exact, *still)) == 0

    model, processor = load_model(tmp_path / "still")
    vision = model.config.vision_config
    transform = ImageTransform(vision.image_size, "square", mean=vision.image_mean, std=vision.image_std)
    data = (tmp_path / "four.json", root / "images", processor.tokenizer, "plain")
    batch = LlavaCollator(0, model.config.image_token_id, vision.num_image_tokens)(
        list(LlavaDataset(*data, transform, vision.num_image_tokens))
    )
    output = model.train()(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values")})
    logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert losses(tmp_path / "still", "lm_loss")[0][0] == pytest.approx(expected.item(), rel=1e-4)

    learned = {name: p for name, p in model.named_parameters() if name in weights(tmp_path / "still")}
    for parameter in learned.values():
        parameter.requires_grad_(True)
    total = expected + vision.router_aux_loss_coef * output.aux_loss
    gradients = torch.autograd.grad(total, list(learned.values()), allow_unused=True)
    before, after = weights(tmp_path / "still"), weights(tmp_path / "moved")
    for name, gradient in zip(learned, gradients, strict=True):
        moved = torch.zeros_like(before[name]) if gradient is None else 0.3 * gradient
        torch.testing.assert_close(before[name] - after[name], moved, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "split", "more"),
    [
        ("pretrain", (4, 2), []),
        ("lora", (2, 4), []),
        ("lora-text", (1, 4), []),
        ("lora", (4, 2), PADDING_FREE),
        ("merge-text", (2, 2), []),
        ("merge-further", (2, 2), PADDING_FREE),
    ],
)
def test_accumulation_changes_nothing(single, root, name, split, more):
    output = root / f"accumulated-{len(more)}-{name}"
    assert main(command(root, name, output, split, *more)) == 0
    assert_same(outcome(output), single[name])


def launch_ranks(root, *kinds, launcher):
    """Run every scenario with each DeepSpeed kind, in one rank pair."""
    lines = []
    for kind in kinds:
        for name, (*_, split) in SCENARIOS.items():
            more = PADDING_FREE if name in ("lora", "full-text") and kind != "none" else []
            lines.append(command(root, name, root / f"{kind}-{name}", split, "--deepspeed", kind, *more))
    file = root / f"{kinds[0]}.json"
    file.write_text(json.dumps(lines))
    launcher([str(file)], module="train_worker")


@pytest.mark.parametrize(
    ("kinds", "launcher"),
    [
        (("zero2", "zero3"), launch_torch),
        pytest.param(("zero3_offload",), launch, marks=pytest.mark.slow),
        pytest.param(("none",), launch_torch, marks=pytest.mark.slow),
    ],
)
def test_ranks_change_nothing(single, root, kinds, launcher):
    launch_ranks(root, *kinds, launcher=launcher)
    for kind in kinds:
        for name in SCENARIOS:
            assert_same(outcome(root / f"{kind}-{name}"), single[name])


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=4))
def test_every_image_has_its_own_noise_whatever_the_split(images):
    """Micro-batches and ranks, in order, hold the global draw once."""
    total = sum(map(sum, images))
    noise, pieces = draw_noise((total, 2, 3), seed=5, step=7), []
    windows = [Window(tokens=1, images=images, samples=1, rank=rank, noise=noise) for rank in (0, 1)]
    for micro in range(len(images)):
        for window in windows:
            window.step = micro
            pieces.append(window.local_noise())
    assert torch.equal(torch.cat(pieces), noise)


def test_noise_depends_only_on_seed_and_step():
    assert torch.equal(draw_noise((3, 2, 2), 1, 4), draw_noise((3, 2, 2), 1, 4))
    assert not torch.equal(draw_noise((3, 2, 2), 1, 4), draw_noise((3, 2, 2), 1, 5))
    assert not torch.equal(draw_noise((3, 2, 2), 2, 4), draw_noise((3, 2, 2), 1, 4))


def test_no_rank_runs_the_tower_when_none_has_an_image():
    window = Window(tokens=1, images=[[0, 0], [0, 1], [0, 0]], samples=1, rank=0)
    for window.step, runs in enumerate([False, True, True]):  # the last one carries the balance loss
        assert window.runs_tower == runs
    assert not Window(tokens=1, images=[[0, 0]], samples=1, rank=0).runs_tower
    assert Window(tokens=1, images=[[0, 0]], samples=1, rank=0, always_tower=True).runs_tower


def check_calls(rows, experts):
    """Check the cost of a rank's micro-batches; return the kinds seen."""
    kinds = []
    for row in rows:
        if row["images"]:
            expected = (experts, row["images"], row["images"])
        elif row["global"]:
            expected = (0, 0, 1)  # one image's worth of zeros through gate and projector; no encoder
        else:
            expected = (0, 0, row["fused"] and 1)  # a window's last micro-batch carries the balance loss
        assert (row["experts"], row["encoded"], row["fused"]) == expected, row
        kinds.append((bool(row["images"]), bool(row["global"]), row["fused"]))
    return set(kinds)


def test_without_images_no_encoder_runs(root, monkeypatch, tmp_path):
    """Pretend another rank, which has images where this one has none.

    Sometimes neither has any.
    """
    rows, opened = count(monkeypatch.setattr), trainer.open_window

    def with_another_rank(batches, device, **kwargs):
        window = opened(batches, device, **kwargs)
        window.images = [[own, other] for (own,), other in zip(window.images, (1, 0), strict=True)]
        return window

    monkeypatch.setattr(trainer, "open_window", with_another_rank)
    assert main(command(root, "lora-text", tmp_path / "out", (1, 2), "--max_steps", "8")) == 0
    assert len(rows) == 16 and {(True, True, 1), (False, True, 1)} <= check_calls(rows, experts=2)
    monkeypatch.setattr(trainer, "open_window", opened)
    rows.clear()
    assert main(command(root, "lora-text", tmp_path / "single", (1, 1), "--max_steps", "8")) == 0
    assert check_calls(rows, experts=2) == {(True, True, 1), (False, False, 0)}


@pytest.mark.slow
def test_ranks_without_images_run_no_encoder(root, tmp_path):
    file = tmp_path / "arguments.json"
    line = command(root, "lora-text", tmp_path / "out", (1, 1), "--deepspeed", "none", "--max_steps", "8")
    file.write_text(json.dumps(line))
    launch_torch([str(file)], "tower_calls_child")
    ranks = [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in (0, 1)]
    kinds = set().union(*(check_calls(rows, experts=2) for rows in ranks))
    assert kinds == {(True, True, 1), (False, True, 1), (False, False, 0)}
    for here, there in zip(*ranks, strict=True):
        assert here["global"] == here["images"] + there["images"]
