"""The hub: order, skipping, non-finite outputs, memory, cost and the table."""

import json
import subprocess
import sys

import pytest
import torch
from experts_zoo import CASES
from train_parts import environment

from tove_llava.cli import main
from tove_llava.core.errors import ConfigError, NonFiniteError
from tove_llava.core.sources import Source
from tove_llava.experts import EXPERTS, ExpertHub, build_expert, complete_specs
from tove_llava.experts.base import library
from tove_llava.experts.cost import expert_cost
from tove_llava.experts.preparation import unnormalise

PIXELS = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(tmp_path):
    named = {"b": "dinov2", "a": "depth-segformer", "c": "normal-dpt-map"}
    hub = ExpertHub(complete_specs([CASES[key].spec(tmp_path / key, name) for name, key in named.items()]))
    hub.load()
    return hub


def test_runs_in_the_order_of_the_specs(hub):
    out = hub.run(PIXELS)
    assert list(out.features) == list(out.valid) == hub.names == ["b", "a", "c"]
    for spec in (hub[name].spec for name in hub.names):
        assert out.features[spec.name].shape == (3, spec.width, *spec.grid)
        assert torch.equal(out.features[spec.name], hub[spec.name](PIXELS))
        assert out.valid[spec.name].tolist() == [True] * 3


def test_skipped_experts_are_not_run_and_may_be_unloaded(hub):
    whole = hub.run(PIXELS).features
    hub.unload(["a"])
    assert not hub.is_loaded() and hub.is_loaded(["b", "c"])
    part = hub.run(PIXELS, skip=["a"]).features
    assert list(part) == ["b", "c"] and all(torch.equal(part[name], whole[name]) for name in part)
    hub.load(["a"])
    assert torch.equal(hub.run(PIXELS).features["a"], whole["a"])
    with pytest.raises(ConfigError, match="no expert 'depht'; it has: b, a, c"):
        hub.run(PIXELS, skip=["depht"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_output_is_named_or_dropped_for_its_image(hub, value):
    clean = hub.run(PIXELS).features

    def poison(module, args, output):
        output = output.clone()
        output[1, 0, 0, 0] = value
        return output

    hub["a"].register_forward_hook(poison)
    words = r"'a' returned non-finite values for image\(s\) \[1\]"
    with pytest.raises(NonFiniteError, match=words):
        hub.run(PIXELS, strict=True)
    with pytest.warns(RuntimeWarning, match=words):
        out = hub.run(PIXELS)
    assert out.valid["a"].tolist() == [True, False, True] and out.valid["b"].all()
    assert not out.features["a"][1].any()
    assert torch.equal(out.features["a"][[0, 2]], clean["a"][[0, 2]])
    assert torch.equal(out.features["b"], clean["b"])


def test_non_finite_pixels_reach_the_check(hub):
    bad = PIXELS.clone()
    bad[2, 0, 5, 5] = float("nan")
    with pytest.raises(NonFiniteError):
        hub.run(bad, strict=True)


def test_saving_by_value_leaves_nothing_of_an_earlier_save(hub, tmp_path):
    (tmp_path / "out" / "experts" / "a").mkdir(parents=True)
    stale = tmp_path / "out" / "experts" / "a" / "stale.safetensors"
    stale.touch()
    specs = hub.save(tmp_path / "out")
    assert not stale.exists()
    again = ExpertHub([spec.to_dict() for spec in specs], base_dir=tmp_path / "out")
    again.load()
    ours, theirs = hub.run(PIXELS).features, again.run(PIXELS).features
    assert all(torch.equal(ours[name], theirs[name]) for name in hub.names)


@pytest.mark.parametrize(
    "entry, gflops, parameters",
    [  # public figures of these models, two operations per multiply-add
        ({"name": "eva"}, 382, 304e6),
        ({"name": "eva", "source": "open_clip:EVA02-L-14-336/merged2b_s6b_b61k"}, 382, 304e6),
        ({"name": "dinov2"}, 382, 304e6),
        ({"name": "sam"}, 794, 308e6),
        ({"name": "sam", "image_size": 1024}, 2986, 308e6),
        ({"name": "depth", "mode": "map"}, 40, 24.8e6),
        ({"name": "depth", "source": "hf:Intel/dpt-large"}, 382, 304e6),
        ({"name": "depth", "source": "hf:Intel/dpt-large", "mode": "map"}, 516, 343e6),
        ({"name": "edge", "mode": "map"}, 114, 35.2e6),
    ],
)
def test_cost_of_the_public_models(entry, gflops, parameters):
    cost = expert_cost(build_expert(entry))
    assert cost.flops / 1e9 == pytest.approx(gflops, rel=0.03)
    assert cost.parameters == pytest.approx(parameters, rel=0.03)


def test_cost_counts_what_is_run(tmp_path):
    spec = CASES["eva-timm"].spec(tmp_path)
    whole, part = (expert_cost(build_expert({**spec, "options": {"layer": layer}})) for layer in (2, 0))
    assert 0 < part.flops < whole.flops
    expert = build_expert(spec)
    expert.load()
    assert expert_cost(expert).parameters == sum(p.numel() for p in expert.parameters())
    assert expert.is_loaded and not any(p.is_meta for p in expert.parameters())


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_verb_lists_every_registered_expert(offline, capsys):
    assert main(["experts", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(EXPERTS)
    [eva] = [row for row in rows if row["source"].startswith("timm:eva02")]
    assert (eva["tokens"], eva["width"], eva["image_size"], eva["licence"]) == (576, 1024, 336, "MIT")
    assert eva["loadable"] is False and "HF_HUB_OFFLINE" in eva["note"]


def test_the_verb_prints_a_table_of_a_preset(offline, tmp_path, capsys):
    source = CASES["depth-segformer"].spec(tmp_path / "depth")["source"]
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        "extends: tiny\nvision:\n  experts:\n"
        f"    - {{name: deep, expert: depth, source: '{source}'}}\n"
        "    - {name: normal, source: 'hf:/no/such/folder'}\n"
    )
    assert main(["experts", "--preset", str(preset)]) == 0
    out = capsys.readouterr().out
    [row] = [line for line in out.splitlines() if line.startswith("deep")]
    assert "3x3" in row and "yes (local)" in row
    assert "not loadable here: normal:" in out and "/no/such/folder does not exist" in out
    assert "no public transformers checkpoint predicts normals" in out


def test_a_missing_library_breaks_only_its_own_experts():
    packages = {"timm": "timm", "kornia": "kornia", "open_clip": "open_clip_torch"}
    program = f"""
import sys
sys.modules |= dict.fromkeys({list(packages)})
from tove_llava.core.errors import ConfigError
from tove_llava.experts import EXPERTS, build_expert
from tove_llava.presets import load_preset
for entry in load_preset("tiny").vision.experts:
    build_expert(entry).load()
for name, scheme in (("dinov2", "timm"), ("edge", "kornia"), ("eva", "open_clip")):
    try:
        build_expert({{"name": name, "source": EXPERTS.get(name)[scheme].default_source}})
    except ConfigError as error:
        print(error)
"""
    run = {"env": environment(HF_HUB_OFFLINE="1"), "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", program], **run)
    assert done.returncode == 0, done.stderr
    for line, (scheme, package) in zip(done.stdout.splitlines(), packages.items(), strict=True):
        assert line.startswith(f"source {scheme}:") and f"needs {package} (pip install {package})" in line


def test_a_library_is_not_imported_onto_the_meta_device(tmp_path, monkeypatch):
    (tmp_path / "some_library.py").write_text("import torch\nCONSTANT = torch.ones(2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with torch.device("meta"), library(Source.parse("bundled:clip"), "some-library"):
        import some_library
    assert some_library.CONSTANT.tolist() == [1, 1]
    sys.modules.pop("some_library")


def test_experts_share_a_resize_and_a_normalisation(tmp_path):
    first = CASES["dinov2"].spec(tmp_path / "a", "a")
    other = CASES["depth-segformer"].spec(tmp_path / "c", "c")
    hub = ExpertHub(complete_specs([first, first | {"name": "b"}, other]))
    hub.load()
    hub["b"].mean = (0.1, 0.2, 0.3)
    ready = hub.condition(PIXELS, hub.names)
    assert ready["a"] is not ready["b"]
    hub["b"].mean = hub["a"].mean
    again = hub.condition(PIXELS, hub.names)
    assert again["a"] is again["b"] and again["a"] is not again["c"]
    for name, pixels in again.items():
        assert torch.equal(pixels, hub[name].condition(PIXELS))
        expert, size = hub[name], (hub[name].image_size,) * 2
        plain = torch.nn.functional.interpolate(PIXELS, size, mode=expert.interpolation, antialias=True).clamp(0, 1)
        plain = plain if size != PIXELS.shape[-2:] else PIXELS
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (expert.mean, expert.std))
        torch.testing.assert_close(pixels, (plain - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_come_back_from_a_towers_normalisation(dtype):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    m, s = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    pixels = unnormalise(((PIXELS * 1.2 - m) / s).to(dtype), mean, std)  # some are above 1
    assert pixels.dtype == torch.float32 and pixels.max() == 1
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(pixels, (PIXELS * 1.2).clamp(0, 1), rtol=tolerance, atol=tolerance)
    with torch.inference_mode():
        unnormalise(PIXELS, mean, std)
    assert unnormalise(PIXELS.clone().requires_grad_(), mean, std).requires_grad
