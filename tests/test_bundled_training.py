"""Training of the bundled parts: targets, augmentation, and an interruptible loop."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tove_llava.scenes import render, sample_scene
from tove_llava.scenes.render import FAR, SKY
from tove_llava.scenes.world import HELD_OUT_PAIRS

sys.path.insert(0, str(Path(__file__).parents[1] / "playground"))

import scene_cache  # noqa: E402
import train_clip  # noqa: E402
import train_expert  # noqa: E402
import training  # noqa: E402

SCENES = [sample_scene(7, "val", i) for i in range(6)]


@given(st.floats(0.5, FAR))
def test_inverse_depth_can_be_undone_is_larger_when_nearer_and_0_for_the_sky(depth):
    assert scene_cache.metres(scene_cache.inverse_depth(np.array(depth))) == pytest.approx(depth, rel=1e-6)
    assert scene_cache.inverse_depth(np.array(0.9 * depth)) > scene_cache.inverse_depth(np.array(depth))
    assert scene_cache.inverse_depth(np.array(FAR)) == 0
    assert scene_cache.metres(np.array(-1.0)) == pytest.approx(FAR)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: str(scene.index))
def test_targets_agree_with_the_rendering(scene):
    view = render(scene, scene_cache.SIZE)
    found = scene_cache.targets(view)
    channels = {"depth": 1, "normal": 3, "edge": 1, "segmentation": 6}
    assert {key: value.shape for key, value in found.items()} == {key: (24, 24, n) for key, n in channels.items()}
    assert (found["segmentation"].sum(-1) == 16).all()
    assert found["segmentation"].sum((0, 1)).tolist() == np.bincount(view.classes.ravel(), minlength=6).tolist()
    assert np.allclose(np.linalg.norm(found["normal"].astype(np.float32), axis=-1), 1, atol=2e-3)
    rows, columns = np.nonzero(view.edges)
    assert found["edge"][rows // 4, columns // 4].all()
    all_sky = (view.instances == SKY).reshape(24, 4, 24, 4).all((1, 3))
    assert (found["depth"][all_sky] == 0).all()


@pytest.mark.parametrize("task", sorted(train_expert.TASKS))
def test_perfect_predictions_get_nearly_perfect_metrics(task):
    views = [render(scene, scene_cache.SIZE) for scene in SCENES]
    maps = np.stack([scene_cache.targets(view)[task] for view in views]).astype(np.float32)
    prediction = torch.from_numpy(maps).permute(0, 3, 1, 2)
    if task == "edge":
        prediction = prediction * 20 - 10  # logits
    metric = train_expert.TASKS[task].measure(prediction, views)
    # What is lost is lost by the quarter resolution.
    assert {
        "depth": lambda: metric["abs_rel"] < 0.05,
        "normal": lambda: metric["median_degrees"] < 2.0,
        "edge": lambda: metric["f1"] == metric["f1_no_tolerance"] == 1.0,
        "segmentation": lambda: metric["miou"] > 0.8,
    }[task](), metric


def test_mirroring_mirrors_images_and_targets_and_turns_normals():
    views = [render(scene, scene_cache.SIZE) for scene in SCENES]
    images = np.stack([view.image for view in views])
    normal = np.stack([scene_cache.targets(view)["normal"] for view in views])
    flips = np.random.default_rng(3).random(len(images)) < 0.5  # the first numbers that augmented() draws
    assert flips.any() and not flips.all()
    _, found = train_expert.augmented(images, normal, "normal", np.random.default_rng(3))
    expected = normal.astype(np.float32)
    assert np.array_equal(found[~flips], expected[~flips])
    assert np.array_equal(found[flips], expected[flips, :, ::-1] * np.array([-1, 1, 1], dtype=np.float32))


def test_a_mirrored_caption_exchanges_only_left_and_right():
    text = "A red cube to the left of a big blue cone, a cyan sphere and a white cube to the right of it."
    mirrored = train_clip.mirrored(text)
    assert mirrored == "A red cube to the right of a big blue cone, a cyan sphere and a white cube to the left of it."
    assert train_clip.mirrored(mirrored) == text


def test_cached_scenes_are_the_parts_split_without_held_out_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(scene_cache, "SHARD", 5)
    scenes = scene_cache.load_scenes(7, seed=1, with_captions=True, folder=tmp_path)
    assert len(scenes.image) == len(scenes.depth) == len(scenes.captions) == 7
    assert np.array_equal(scenes.image[6], render(sample_scene(1, "parts", 6), scene_cache.SIZE).image)
    again = scene_cache.load_scenes(7, seed=1, with_captions=True, folder=tmp_path)
    assert np.array_equal(scenes.image, again.image)
    assert scenes.captions == again.captions
    words = [" ".join(pair) for pair in HELD_OUT_PAIRS]
    assert not any(word in text for row in scenes.captions for text in row for word in words)


def _train(state, steps_before_interruption=None, steps=12):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)

    def loss_of_step(step):
        if step == steps_before_interruption:
            raise KeyboardInterrupt
        return (model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))) - 1).square().mean()

    keys = {"batch": 8, "learning_rate": 0.1, "weight_decay": 0.1, "signature": {"steps": steps}}
    training.train(model, loss_of_step, steps=steps, **keys, state=state)
    return model.weight.detach()


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", -1.0)  # after each step
    expected = _train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "broken", steps_before_interruption=7)
    assert torch.equal(_train(tmp_path / "broken"), expected)


def test_a_state_of_other_settings_is_refused(tmp_path):
    _train(tmp_path)
    with pytest.raises(SystemExit, match="other settings"):
        _train(tmp_path, steps=3)
