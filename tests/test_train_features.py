"""A run that reads features equals the run that computes them."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils.data._utils.pin_memory import pin_memory
from train_parts import flags, weights, write_inputs, write_records
from train_parts import losses as train_losses

from tove_llava.cli import main as cli
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import ImageTransform
from tove_llava.llava.build import vision_config
from tove_llava.presets import load_preset
from tove_llava.tower import ToveVisionModel, TowerFeatures, balance_loss
from tove_llava.tower.frozen import FrozenBackbones
from tove_llava.train.arguments import parse
from tove_llava.train.feature_cache import FeatureCache
from tove_llava.train.feature_stores import Shards, write_shard
from tove_llava.train.run import main as train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("features"))
    assert make(folder) == 0
    return folder


def make(folder, *more, out=None, data=("captions.json", "instruct.json")):
    where = {"preset": folder / "preset.yaml", "image-folder": folder / "images", "out": out or folder / "cache"}
    words = [word for key, value in where.items() for word in (f"--{key}", str(value))]
    words += [word for name in data for word in ("--data", str(folder / name))]
    return cli(["features", *words, "--image-aspect-ratio", "square", *more])


def open_cache(folder, image_folder=None, cache=None, dtype=torch.float32, aspect_ratio="square", **changes):
    config = vision_config(load_preset(str(folder / "preset.yaml")).vision)
    for key, value in changes.items():
        setattr(config, key, value)
    return FeatureCache(cache or folder / "cache", config, aspect_ratio, image_folder, dtype)


def refuse(*args):
    raise AssertionError("an image was opened")


@pytest.mark.parametrize(
    ("stage", "store", "bound"),
    [
        ("pretrain", "float32", 1e-5),
        ("finetune", "float32", 1e-5),
        ("pretrain", "float16", 1e-3),
        ("pretrain", "int8", 1e-2),
    ],
)
def test_run_on_the_cache_equals_the_run_on_images_and_opens_none(root, tmp_path, monkeypatch, stage, store, bound):
    cache = root / "cache" if store == "float32" else tmp_path / "cache"
    assert make(root, "--store", store, out=cache) == 0
    square = ("--image_aspect_ratio", "square", "--max_steps", "3", "--set", "vision.experts.normal.mode=map")
    assert train(flags(root, stage, tmp_path / "images", *square)) == 0
    monkeypatch.setattr(ImageTransform, "open", refuse)
    assert train(flags(root, stage, tmp_path / "cached", *square, "--feature_cache", str(cache))) == 0
    assert losses(tmp_path / "cached") == [pytest.approx(row, rel=bound) for row in losses(tmp_path / "images")]
    if store == "float32":
        torch.testing.assert_close(*(weights(tmp_path / run) for run in ("cached", "images")), rtol=1e-5, atol=1e-6)


def losses(output):
    found = train_losses(output, "lm_loss", "aux_loss")
    assert found and all(aux > 0 for _, aux in found)
    return found


def train_cached(folder, output, cache=None, *more):
    options = ("--image_aspect_ratio", "square", "--max_steps", "1", "--feature_cache", str(cache or folder / "cache"))
    return train(flags(folder, "pretrain", output, *options, *more))


def test_gradients_from_the_cache_are_those_from_images(root):
    preset = load_preset(str(root / "preset.yaml"))
    tower = ToveVisionModel(vision_config(preset.vision)).load_backbones().train()
    torch.nn.init.normal_(tower.fusion.output.weight)
    names, transform = ["0.png", "4.png", "7.png"], ImageTransform(tower.config.image_size, "square")
    pixels = torch.stack([transform.open(root / "images" / name) for name in names])
    noise = torch.randn(3, tower.config.num_patches, 2, generator=torch.Generator().manual_seed(0))
    results = []
    for features in (None, open_cache(root).read(names)):
        out = tower(pixels if features is None else None, features=features, gate_noise=noise)
        balance = balance_loss(tower.fusion.balance_statistics([out.gate_inputs]))
        terms = (out.last_hidden_state.square().mean(), balance)
        wanted = {"retain_graph": True, "materialize_grads": True}
        grads = [grad for term in terms for grad in torch.autograd.grad(term, list(tower.parameters()), **wanted)]
        results.append([*(term.detach() for term in terms), *grads])
    assert results[0][1] > 0 and results[0][2].any()
    for images, cached in zip(*results, strict=True):
        assert (cached - images).norm() <= 1e-5 * images.norm()


def test_cache_of_another_source_size_or_set_of_images_is_refused(root, tmp_path, capsys):
    for message, changes in {
        "image_aspect_ratio": {"aspect_ratio": "pad"},
        "layer differ": {"clip_layer": -3},
        "tove-llava features": {"cache": tmp_path},
    }.items():
        with pytest.raises(ConfigError, match=message):
            open_cache(root, **changes)
    (root / "fewer.json").write_text(json.dumps(json.loads((root / "captions.json").read_text())[:3]))
    assert make(root, "--data", str(root / "fewer.json")) == 0, "the same images again are no other cache"
    assert make(root, data=["fewer.json"]) == 2
    assert "other images" in capsys.readouterr().err


def test_cache_is_pickled_for_workers_that_are_not_forked_and_names_an_absent_image(root):
    cache = open_cache(root)
    expected, found = cache.read(["1.png"]), pickle.loads(pickle.dumps(cache)).read(["1.png"])
    assert torch.equal(found.base, expected.base)
    assert all(torch.equal(found.experts[name], expected.experts[name]) for name in expected.experts)
    with pytest.raises(DataError, match="nowhere.png"):
        cache.read(["0.png", "nowhere.png"])


def times(folder):
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_only_what_is_missing_is_made_again(root):
    before = times(root / "cache")
    (root / "cache" / "normal" / "000000.safetensors").unlink()
    with pytest.raises(ConfigError, match="not complete.*normal"):
        open_cache(root)
    assert make(root) == 0
    after = times(root / "cache")
    assert {name for name in after if after[name] != before[name]} == {"normal/000000.safetensors"}


def test_interrupted_cache_goes_on_and_equals_one_made_at_once(own, monkeypatch, tmp_path):
    whole = open_cache(own).read(["0.png", "5.png"])
    shutil.rmtree(own / "cache")
    real, calls = FrozenBackbones.encode, []

    def encode(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(FrozenBackbones, "encode", encode)
    small = ("--shard-images", "2", "--batch-size", "2")
    assert make(own, *small) == 130
    before = times(own / "cache")
    assert {n for n in before if n.startswith("clip/0")} == {"clip/000000.safetensors", "clip/000001.safetensors"}
    assert make(own, *small) == 0
    assert before.items() <= times(own / "cache").items()
    again = open_cache(own).read(["0.png", "5.png"])
    torch.testing.assert_close((again.base, again.experts), (whole.base, whole.experts))


def test_processes_share_a_cache(own, tmp_path, capsys):
    shutil.rmtree(own / "cache")
    small = ("--shard-images", "2")
    assert make(own, *small, "--share", "1/2") == 0
    assert "still missing" in capsys.readouterr().out
    assert not (own / "cache" / "clip" / "000000.safetensors").exists()
    assert train_cached(own, tmp_path / "run") == 2
    assert "not complete" in capsys.readouterr().err
    assert make(own, *small, "--share", "0/2") == 0
    assert "missing" not in capsys.readouterr().out
    assert train_cached(own, tmp_path / "run") == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--share", "2/2"), "--share 2/2"),
        (("--share", "half"), "--share half"),
        (("--shard-images", "0"), "--shard-images must be at least 1"),
        (("--store", "float8"), "unknown store 'float8'.*float16"),
        (("--store", "int8"), "begun with --store float32"),
        (("--shard-images", "3"), "begun with .*--shard-images 256"),
    ],
)
def test_wrong_flags_are_explained(root, capsys, flags, words):
    before = times(root / "cache")
    assert make(root, *flags) == 2
    assert re.search(words, capsys.readouterr().err)
    assert times(root / "cache") == before


@pytest.mark.parametrize(("store", "bound"), [("float16", 1e-3), ("int8", 1e-2)])
def test_rounded_stores_keep_features(root, tmp_path, store, bound):
    assert make(root, "--store", store, out=tmp_path) == 0
    plain, kept = (open_cache(root, root / "images", cache).read(["0.png", "3.png"]) for cache in (None, tmp_path))
    for name, values in {"clip": plain.base, **plain.experts}.items():
        found = {"clip": kept.base, **kept.experts}[name].float()
        assert (found - values).norm() < bound * values.norm()


@pytest.mark.parametrize(("store", "bytes_each"), [("float32", 4), ("float16", 2), ("int8", 1 + 4 / 32)])
def test_size_of_a_value(tmp_path, store, bytes_each):
    values = np.random.default_rng(0).standard_normal((4, 16, 24, 24), np.float32)
    write_shard(tmp_path / "part" / "0.safetensors", values, store)
    size = (tmp_path / "part" / "0.safetensors").stat().st_size
    assert 0 < size - bytes_each * values.size < 500  # the header


def test_cache_computed_in_16_bits_serves_runs_that_compute_so(root, tmp_path, capsys):
    folder = tmp_path / "cache"
    assert make(root, "--dtype", "bfloat16", out=folder) == 0
    message = "computed in bfloat16, and this run computes in float32.*features --dtype float32"
    with pytest.raises(ConfigError, match=message):
        open_cache(root, cache=folder)
    features = open_cache(root, cache=folder, dtype=torch.bfloat16).read(["0.png"])
    assert torch.equal(features.base, features.base.to(torch.bfloat16).float())  # what 16 bits hold
    exact = open_cache(root, dtype=torch.bfloat16).read(["0.png"])  # of float32, which serves every run
    assert 0 < (features.base - exact.base).norm() < 2e-2 * exact.base.norm()
    assert train_cached(root, tmp_path / "run", folder) == 2 and re.search(message, capsys.readouterr().err)
    assert train_cached(root, tmp_path / "run", folder, "--bf16", "True") == 0
    assert make(root, out=folder) == 2 and "dtype differ" in capsys.readouterr().err, "and is not added to"
    assert make(root, "--dtype", "int8", out=tmp_path / "other") == 2


@given(
    values=arrays(
        np.float32,
        st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 9), st.integers(1, 9)),
        elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
    )
)
def test_eight_bits_round_by_half_a_step_of_their_block(values, tmp_path_factory):
    file = tmp_path_factory.mktemp("shard") / "part" / "0.safetensors"
    write_shard(file, values, "int8")
    found = Shards([file], len(values), "int8").read(range(len(values)))
    assert found.shape == values.shape and found.dtype == np.float32
    largest = np.abs(values).max(axis=(2, 3), keepdims=True)  # of a channel; a block's is no larger
    assert (np.abs(found - values) <= largest / 127 * 0.5001 + 1e-38).all()


def test_value_too_large_for_float16_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="float16; store int8 or float32"):
        write_shard(tmp_path / "part" / "0.safetensors", np.full((1, 1, 2), 1e5, np.float32), "float16")
    assert not list((tmp_path / "part").glob("*"))


@pytest.fixture
def own(tmp_path):
    """Parts, records and a cache that a test may damage."""
    folder = write_inputs(tmp_path / "own")
    assert make(folder) == 0
    return folder


def replace_content(file):
    """Change a file's content, but not its name and size."""
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


def test_image_replaced_by_another_makes_the_cache_stale(own, tmp_path, capsys):
    replace_content(own / "images" / "1.png")
    assert train_cached(own, tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "stale" in message and "1.png" in message and "tove-llava features" in message
    (own / "cache" / "normal" / "000000.safetensors").unlink()
    assert make(own) == 2, "nor are parts of other images added to it"
    assert "stale" in capsys.readouterr().err


def test_copied_images_are_the_same_and_a_cache_without_a_dtype_is_float32(own, tmp_path):
    for file in (own / "cache").glob("*/part.json"):  # written before the choice of a dtype
        content = json.loads(file.read_text())
        assert content.pop("dtype") == "float32"
        file.write_text(json.dumps(content))
    for file in (own / "images").iterdir():
        file.touch()
    assert make(own) == 0
    assert train_cached(own, tmp_path / "touched") == 0
    open_cache(own, tmp_path)  # images that are gone have not changed


def test_local_weights_replaced_by_others_make_the_cache_stale(own):
    open_cache(own)
    replace_content(own / "normal" / "model.safetensors")
    with pytest.raises(ConfigError, match="has changed since normal was computed"):
        open_cache(own)


def test_damage_earlier_layouts_and_unknown_origins_are_named(own, tmp_path, capsys):
    cache = own / "cache"
    shard = cache / "clip" / "000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"clip.000000\.safetensors is damaged"):
        open_cache(own).read(["0.png"])
    (cache / "pictures" / "000000.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"000000\.json is damaged"):
        open_cache(own, own / "images")
    (cache / "normal" / "part.json").unlink()
    assert make(own) == 2 and "does not say what it was computed from" in capsys.readouterr().err
    (cache / "images.json").write_text(json.dumps({"image_aspect_ratio": "square", "images": []}))
    assert make(own) == 2 and "another version" in capsys.readouterr().err
    assert train_cached(own, tmp_path / "run") == 2 and "another version" in capsys.readouterr().err


def test_features_are_joined_in_order():
    parts = [TowerFeatures(torch.full((n, 2, 3), float(n)), {"a": torch.full((n, 1, 2, 2), float(n))}) for n in (1, 2)]
    parts[1].usable = {"a": torch.tensor([True, False])}
    joined = TowerFeatures.cat(parts)
    assert len(joined) == 3 and joined.usable["a"].tolist() == [True, True, False]
    assert joined.base[:, 0, 0].tolist() == joined.experts["a"][:, 0, 0, 0].tolist() == [1, 2, 2]
    moved = joined.to(dtype=torch.float16)
    assert moved.base.dtype == torch.float16 and moved.usable["a"].dtype == torch.bool


def test_features_are_pinned_and_copied_during_the_step(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)  # there is no GPU to pin it for
    features = TowerFeatures(torch.zeros(1, 2, 3), {"a": torch.zeros(1, 1, 2, 2)})
    pinned = pin_memory({"vision_features": features})["vision_features"]  # as a DataLoader does
    assert pinned.base.all() and pinned.experts["a"].all()
    write_records(tmp_path)
    arguments = parse(flags(tmp_path, "pretrain", tmp_path / "out", "--preset", "tiny"))
    for on_gpu in (True, False):
        monkeypatch.setattr("tove_llava.train.run_settings._has_accelerator", lambda on_gpu=on_gpu: on_gpu)
        made = arguments.training_arguments()
        assert made.dataloader_pin_memory == made.accelerator_config.non_blocking == on_gpu
