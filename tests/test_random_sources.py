"""Experts of timm by name only, and true architectures with random weights."""

import pytest
import timm
import torch
from answer_parts import picture
from experts_zoo import CASES

from tove_llava import load_tower
from tove_llava.cli import main
from tove_llava.core.errors import ConfigError
from tove_llava.experts import ExpertHub, build_expert, complete_specs
from tove_llava.llava.build import build_model, read_language_model
from tove_llava.presets import LanguagePreset

pytestmark = pytest.mark.filterwarnings("ignore:.*the weights are random")

PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def loaded(spec):
    expert = build_expert(spec)
    with pytest.warns(UserWarning, match="the weights are random"):
        expert.load()
    return expert


def test_any_model_of_timm_is_an_expert_by_its_name():
    entry = {"name": "shapes", "source": "random:timm:convnext_atto", "image_size": 64}
    [spec] = complete_specs([entry])
    # The default tag of today is recorded, and the class that reads it.
    assert (spec.expert, spec.source) == ("timm", "random:timm:convnext_atto.d2_in1k")
    assert (spec.width, spec.grid) == (320, (2, 2))
    expert = loaded(spec)
    expected = timm.create_model("convnext_atto", num_classes=0).eval()
    expected.load_state_dict(expert.network.state_dict())
    pixels = expert.condition(PIXELS)
    with torch.no_grad():
        tokens = expected.forward_features(pixels)
    torch.testing.assert_close(expert(PIXELS), tokens, rtol=1e-4, atol=1e-4)


def test_a_folder_of_timm_is_named_by_its_path(tmp_path, monkeypatch):
    CASES["timm-vit"].spec(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    [spec] = complete_specs([{"name": "mine", "source": "timm:./vit"}])
    assert spec.source == f"timm:local-dir:{tmp_path / 'vit'}"  # as versions before read it


def test_a_model_without_tokens_is_refused(monkeypatch):
    monkeypatch.delattr(timm.models.convnext.ConvNeXt, "forward_intermediates")
    with pytest.raises(ConfigError, match="has no forward_intermediates"):
        build_expert({"name": "odd", "source": "timm:convnext_femto"})


@pytest.mark.parametrize("key", ["eva-open_clip", "depth-segformer-map", "segmentation-mask2former", "dinov2"])
def test_every_library_has_random_weights_that_are_the_same_in_every_run(key, tmp_path):
    spec = CASES[key].spec(tmp_path / "source")
    spec["source"] = f"random:{spec['source']}"
    [weights] = (tmp_path / "source").glob("*.safetensors")
    weights.unlink()  # none are read
    first, _, second = loaded(spec), torch.rand(3), loaded(spec)  # whatever was drawn before
    assert torch.equal(first(PIXELS), second(PIXELS)) and not torch.equal(*first(PIXELS))
    hub = ExpertHub([spec])
    hub["x"].load()
    [saved] = hub.save(tmp_path / "checkpoint")
    again = ExpertHub([saved], base_dir=tmp_path / "checkpoint")
    again.load()
    assert not saved.source.startswith("random") and torch.equal(again["x"](PIXELS), first(PIXELS))
    assert "RANDOM WEIGHTS" in (tmp_path / "checkpoint" / "experts" / "x" / "README.md").read_text()


RANDOM = ["vision.clip=random:bundled:clip", "language.source=random:bundled:llm", "language.tokenizer=bundled:llm",
          "vision.experts=[{name: shapes, source: 'random:timm:convnext_atto', image_size: 64}]"]  # fmt: skip


def test_a_whole_model_of_random_weights_says_so_and_comes_back(tmp_path):
    with pytest.warns(UserWarning, match="random:bundled:clip: the weights are random"):
        model, processor = build_model("tiny", overrides=RANDOM)
    model.eval().save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| expert shapes | RANDOM WEIGHTS, architecture of timm:convnext_atto.d2_in1k" in card
    assert "| vision tower's CLIP | RANDOM WEIGHTS, architecture of bundled:clip | none (random weights) |" in card
    assert "base_model" not in card
    with pytest.warns(UserWarning, match="random"):
        again = load_tower(tmp_path / "saved")
    image = picture(1)
    assert torch.equal(again(image).last_hidden_state, model.tower(image).last_hidden_state)
    assert not torch.equal(load_tower("tiny")(image).last_hidden_state, again(image).last_hidden_state)


def test_a_random_language_model_is_the_same_in_every_dtype():
    preset = LanguagePreset("random:bundled:llm")
    with pytest.warns(UserWarning, match="random:bundled:llm"):
        one, other = read_language_model(preset), read_language_model(preset, "bfloat16")
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_the_commands_know_random_sources(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "extends: tiny\nvision:\n  experts:\n    - {name: shapes, source: 'random:timm:convnext_atto'}\n"
    )
    assert main(["experts", "--preset", str(tmp_path / "mine.yaml")]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("shapes")]
    assert "random:timm:convnext_atto.d2_in1k" in row and "none (random weights)" in row and "yes" in row
