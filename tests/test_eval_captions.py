"""The caption metrics' Java programs: missing ones, odd ones, and cleaning up."""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from score_parts import SAMPLES, refuse, score, truth_file

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.eval import java
from tove_llava.eval.benchmarks import get_benchmark
from tove_llava.eval.captions import Tokens, caption_scores

HAVE_PACKAGE = importlib.util.find_spec("pycocoevalcap") is not None
needs_package = pytest.mark.skipif(not HAVE_PACKAGE, reason="needs pycocoevalcap")
needs_java = pytest.mark.skipif(not HAVE_PACKAGE or not shutil.which("java"), reason="needs pycocoevalcap and Java")


def sample(name="coco_caption"):
    folder = SAMPLES / name
    return folder / "predictions.jsonl", truth_file(folder)


@needs_package
def test_missing_java_is_told_before_anything_is_read(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refuse(capsys, "coco_caption", tmp_path / "nothing", tmp_path / "nothing")
    assert "need Java" in message and "apt-get install" in message


def test_missing_package_is_told(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'tove-llava[eval]'" in refuse(capsys, "nocaps", *sample("nocaps"))


@needs_package
def test_a_failing_java_is_told_and_not_waited_for(monkeypatch, tmp_path):
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho 'out of memory' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="tokenizer failed .*out of memory"):
        java.tokenize(["a cat"])
    with java.Meteor() as meteor, pytest.raises(ConfigError, match="METEOR failed: out of memory"):
        meteor.statistics("a cat", ["a cat"])


def test_ground_truths_are_told_apart(capsys, monkeypatch):
    monkeypatch.setattr(java, "check", lambda: None)
    predictions, _ = sample()
    assert "--benchmark nocaps" in refuse(capsys, "coco_caption", predictions, sample("nocaps")[1])
    assert "'domain' is missing" in refuse(capsys, "nocaps", predictions, sample()[1])


def test_an_image_without_captions_is_told(tmp_path):
    file = tmp_path / "truth.jsonl"
    file.write_text('{"image_id": 1, "references": []}\n')
    with pytest.raises(DataError, match="image 1: 'references' must be a list of captions"):
        get_benchmark("coco_caption").read_ground_truth(file)


@needs_java
def test_each_caption_is_one_line_whatever_it_holds():
    ends = ["a\nb", "a\rb", "a\r\nb", "a\u2028b", "a\u2029b", "a\x85b", "a\vb", "a\fb"]
    odd = ["", " ", ".", "one \ud83d two", "the cat", "", ""]
    tokens = java.tokenize([*ends, *odd])
    assert tokens[: len(ends)] == ["a b"] * len(ends)
    assert tokens[len(ends) :] == ["", "", "", "one two", "the cat", "", ""]


@needs_java
def test_no_process_and_no_file_is_left(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    package = Path(next(iter(importlib.util.find_spec("pycocoevalcap").submodule_search_locations)))
    before = {path for path in package.rglob("*") if "__pycache__" not in path.parts}
    with pytest.raises(ZeroDivisionError), java.Meteor() as meteor:
        1 / 0  # noqa: B018
    assert meteor._process.poll() is not None
    java.tokenize(["a cat"])
    assert {path for path in package.rglob("*") if "__pycache__" not in path.parts} == before
    assert not list(tmp_path.iterdir())
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
    assert "java" not in children


@needs_java
@pytest.mark.slow
def test_a_missing_caption_counts_as_an_empty_one(capsys, tmp_path):
    predictions, truth = sample("nocaps")
    file = tmp_path / "predictions.jsonl"
    file.write_text(predictions.read_text().splitlines()[0] + "\n")
    got = score(capsys, "nocaps", file, truth)
    assert got["count"] == 2 and got["unanswered"] == [8]
    assert got["scores"]["ROUGE_L"] == pytest.approx(0.5) and got["scores"]["CIDEr"] == pytest.approx(5)
    assert got["domains"]["out-domain"]["METEOR"] == 0


@needs_java
@pytest.mark.slow
def test_references_without_words_are_told():
    with pytest.raises(DataError, match="hold no words"):
        caption_scores(Tokens({1: "a cat"}, {1: [""]}), [[1]])
