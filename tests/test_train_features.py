"""Features computed once: a run that reads them is the run that computes them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from train_parts import flags, write_parts, write_records

from tove_llava.cli import main as cli
from tove_llava.errors import ConfigError, DataError
from tove_llava.llava.build import vision_config
from tove_llava.presets import load_preset
from tove_llava.sources import Source
from tove_llava.tower import TowerFeatures
from tove_llava.train.features import FeatureCache
from tove_llava.train.run import main as train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    write_parts(folder)
    write_records(folder)
    assert make(folder) == 0
    return folder


def make(folder, *more):
    data = ["--data", str(folder / "captions.json"), "--data", str(folder / "instruct.json")]
    arguments = ["features", "--preset", str(folder / "preset.yaml"), *data, "--image-folder", str(folder / "images")]
    return cli([*arguments, "--out", str(folder / "cache"), "--image-aspect-ratio", "square", *more])


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_run_on_the_cache_equals_the_run_on_pictures(root, tmp_path, stage):
    square = ("--image_aspect_ratio", "square", "--max_steps", "3")
    more = ("--set", "vision.experts.normal.mode=map")
    assert train(flags(root, stage, tmp_path / "pictures", *square, *more)) == 0
    cached = ("--feature_cache", str(root / "cache"))
    assert train(flags(root, stage, tmp_path / "cached", *square, *more, *cached)) == 0
    name = "trained.safetensors" if stage == "pretrain" else "model.safetensors"
    pictures, cached = (load_file(tmp_path / run / name) for run in ("pictures", "cached"))
    assert pictures.keys() == cached.keys()
    for key, value in pictures.items():
        torch.testing.assert_close(cached[key], value, rtol=1e-5, atol=1e-6)


def test_run_on_the_cache_opens_no_picture(root, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("a picture was opened")

    monkeypatch.setattr("tove_llava.data.images.ImageTransform.open", refuse)
    options = ("--image_aspect_ratio", "square", "--max_steps", "1", "--feature_cache", str(root / "cache"))
    assert train(flags(root, "pretrain", tmp_path / "run", *options)) == 0


def test_cache_of_another_source_size_or_set_of_images_is_refused(root, tmp_path, capsys):
    config = vision_config(load_preset(str(root / "preset.yaml")).vision)
    with pytest.raises(ConfigError, match="image_aspect_ratio"):
        FeatureCache(root / "cache", config, "pad")
    config.clip_layer = -3
    with pytest.raises(ConfigError, match="layer differ"):
        FeatureCache(root / "cache", config, "square")
    with pytest.raises(ConfigError, match="tove-llava features"):
        FeatureCache(tmp_path, config, "square")
    (root / "fewer.json").write_text(json.dumps(json.loads((root / "captions.json").read_text())[:3]))
    assert make(root, "--data", str(root / "fewer.json")) == 0, "the same images again are no other cache"
    arguments = ["features", "--preset", str(root / "preset.yaml"), "--data", str(root / "fewer.json")]
    arguments += ["--image-folder", str(root / "images"), "--out", str(root / "cache")]
    assert cli([*arguments, "--image-aspect-ratio", "square"]) == 2
    assert "other images" in capsys.readouterr().err


def test_image_that_is_not_in_the_cache_is_named(root):
    config = vision_config(load_preset(str(root / "preset.yaml")).vision)
    with pytest.raises(DataError, match="nowhere.png"):
        FeatureCache(root / "cache", config, "square").read(["0.png", "nowhere.png"])


def test_interrupted_cache_is_made_again_where_it_is_incomplete(root):
    before = {file.name: file.stat().st_mtime_ns for file in (root / "cache").iterdir()}
    (root / "cache" / "normal.json").unlink()
    assert make(root) == 0
    after = {file.name: file.stat().st_mtime_ns for file in (root / "cache").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"normal.npy", "normal.json"}


@pytest.fixture
def own(root, tmp_path):
    """Parts, records and a cache that a test may damage."""
    folder = tmp_path / "own"
    write_parts(folder)
    shutil.copytree(root / "images", folder / "images")
    for name in ("captions.json", "instruct.json"):
        shutil.copy(root / name, folder)
    assert make(folder) == 0
    return folder


def train_cached(folder, output):
    options = ("--image_aspect_ratio", "square", "--max_steps", "1", "--feature_cache", str(folder / "cache"))
    return train(flags(folder, "pretrain", output, *options))


def replace_picture(file):
    """Another picture of the same name, size in bytes and time: only its content tells."""
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


def test_picture_replaced_by_another_makes_the_cache_stale(own, tmp_path, capsys):
    replace_picture(own / "images" / "1.png")
    assert train_cached(own, tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert "stale" in told and "1.png" in told and "tove-llava features" in told
    (own / "cache" / "normal.json").unlink()
    assert make(own) == 2, "nor are parts of other pictures added to it"
    assert "stale" in capsys.readouterr().err


def test_copied_pictures_are_the_same_pictures(own, tmp_path):
    for file in (own / "images").iterdir():
        file.touch()
    assert make(own) == 0
    assert train_cached(own, tmp_path / "touched") == 0
    config = vision_config(load_preset(str(own / "preset.yaml")).vision)
    FeatureCache(own / "cache", config, "square", tmp_path)  # and where there are none, none has changed


def test_local_weights_replaced_by_others_make_the_cache_stale(own):
    config = vision_config(load_preset(str(own / "preset.yaml")).vision)
    FeatureCache(own / "cache", config, "square")
    spec = config.expert_specs[0]
    path = Source.parse(spec.source).path
    weights = next(file for file in path.rglob("*") if file.suffix in (".safetensors", ".bin"))
    replace_picture(weights)
    with pytest.raises(ConfigError, match=f"has changed since {spec.name} was computed"):
        FeatureCache(own / "cache", config, "square")


def test_cache_without_fingerprints_is_read_with_a_warning(own, tmp_path, caplog):
    for file in (own / "cache").glob("*.json"):
        made = json.loads(file.read_text())
        del made["files"]
        file.write_text(json.dumps(made))
    assert make(own) == 0 and train_cached(own, tmp_path / "run") == 0
    assert "earlier version" in caplog.text


def test_damaged_fingerprints_are_told(own):
    file = own / "cache" / "images.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "files": []}))
    config = vision_config(load_preset(str(own / "preset.yaml")).vision)
    with pytest.raises(ConfigError, match=r"images\.json is damaged"):
        FeatureCache(own / "cache", config, "square", own / "images")


def test_features_are_joined_in_order():
    parts = [TowerFeatures(torch.full((n, 2, 3), float(n)), {"a": torch.full((n, 1, 2, 2), float(n))}) for n in (1, 2)]
    parts[1].usable = {"a": torch.tensor([True, False])}
    joined = TowerFeatures.cat(parts)
    assert len(joined) == 3
    assert joined.base[:, 0, 0].tolist() == joined.experts["a"][:, 0, 0, 0].tolist() == [1, 2, 2]
    assert joined.usable["a"].tolist() == [True, True, False]
    moved = joined.to(dtype=torch.float16)
    assert moved.base.dtype == torch.float16
    assert moved.usable["a"].dtype == torch.bool
