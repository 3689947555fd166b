"""The caption metrics' Java programs: missing ones, odd ones, and cleaning up."""

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from score_parts import SAMPLES, refuse, score, truth_file

from tove_llava import cli
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
    with pytest.raises(DataError, match="line 1: 'references' must be a list of at least 1"):
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


@needs_package
def test_each_image_has_its_own_numbers(monkeypatch):
    class Meteor:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def statistics(self, candidate, references):
            return candidate

        def evaluate(self, candidates):
            return 0.5, [len(candidate) / 100 for candidate in candidates]

    monkeypatch.setattr(java, "Meteor", Meteor)
    candidates = {7: "a red bus parks near trees", 8: "two dogs run on hot sand", 9: "a boat"}
    references = {7: ["a red bus parks near trees"], 8: ["two dogs run in the sea"], 9: ["nothing at all"]}
    tokens = Tokens(candidates, references)
    whole, part = caption_scores(tokens, [[7, 8, 9], [9, 7]])
    assert list(whole.per_image) == [7, 8, 9] and list(part.per_image) == [9, 7]
    exact, near, far = whole.per_image.values()
    assert [exact[f"Bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx([1] * 4, abs=1e-6)
    assert [near[f"Bleu_{n}"] for n in (1, 2, 3)] == pytest.approx(
        [(3 / 6), (3 / 6 * 2 / 5) ** 0.5, (0.2 / 4) ** (1 / 3)]
    )
    assert (exact["ROUGE_L"], near["ROUGE_L"], far["ROUGE_L"]) == pytest.approx((1, 0.5, 0))
    assert [scores["METEOR"] for scores in (exact, near, far)] == [0.26, 0.24, 0.06]
    assert exact["CIDEr"] == pytest.approx(10) and 0 < near["CIDEr"] < 5 and far["CIDEr"] == 0
    assert part.per_image[7]["METEOR"] == 0.26 and part.total["METEOR"] == 0.5
    for name in ("ROUGE_L", "CIDEr"):
        assert whole.total[name] == pytest.approx(sum(scores[name] for scores in (exact, near, far)) / 3)


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
def test_one_odd_caption_spoils_no_other(capsys, tmp_path):
    references = {1: ["a cat on a mat"], 2: ["a dog runs", "a ||| dog"], 3: ["the\nred car", ""], 4: [".", ""]}
    file, truth = tmp_path / "predictions.jsonl", tmp_path / "truth.jsonl"
    lines = [json.dumps({"image_id": key, "references": texts}) for key, texts in references.items()]
    truth.write_text("\n".join(lines))
    answers = {1: "a cat ||| on\u2028a mat", 2: "a dog\nruns", 3: "the red car", 4: ""}
    file.write_text("\n".join(json.dumps({"question_id": key, "text": text}) for key, text in answers.items()))
    got = score(capsys, "coco_caption", file, truth)
    assert got["unparsed_ids"] == [4] == got["wordless_references"] and got["count"] == 4
    assert [got["per_item"][key]["METEOR"] for key in "23"] == [1, 1] and 0.3 < got["per_item"]["1"]["METEOR"] < 1


@needs_java
@pytest.mark.slow
def test_captions_of_ones_own(capsys, tmp_path):
    questions, answers = tmp_path / "mine.jsonl", tmp_path / "answers.jsonl"
    questions.write_text('{"question": "Describe.", "image": "0.png", "answers": ["a cat on a mat", "the cat"]}\n')
    answers.write_text('{"question_id": 0, "text": "A cat on a mat."}\n')
    command = ["score", "--questions", str(questions), "--rule", "caption", "--predictions", str(answers), "--json"]
    assert cli.main(command) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["scores"]["ROUGE_L"] == got["scores"]["METEOR"] == 1 and got["rule"] == "caption"


@needs_java
@pytest.mark.slow
def test_references_without_words_are_told():
    with pytest.raises(DataError, match="hold no words"):
        caption_scores(Tokens({1: "a cat"}, {1: [""]}), [[1]])
