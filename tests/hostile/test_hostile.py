"""Hostile inputs of every kind: 50 of each, and 1,000 with ``-m slow``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hostile.chat_requests import requests
from hostile.invariant import Case, attempt, describe
from hostile.kinds import KINDS as COMMANDS
from hostile.kinds import good_records, make_world

from tove_llava.cli import main
from tove_llava.inference.engine import Engine
from tove_llava.inference.generation import Answerer
from tove_llava.train import run as training
from tove_llava.train.arguments import parse

FEW, MANY = 50, 1000
KINDS = {**COMMANDS, "requests": requests}
PLAIN = ("images", "records", "answers", "templates")  # kinds that need no stand-in

_CODES = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from hostile.invariant import attempt
from hostile.kinds import KINDS, make_world
folder, found = Path(sys.argv[3]), {}
world = make_world(folder / "world")
for kind in sys.argv[5:]:
    for seed in range(int(sys.argv[4])):
        (place := folder / f"{kind}{seed}").mkdir()
        outcome = attempt(KINDS[kind](seed, place, world))
        found[f"{kind} {seed}"] = [outcome.code, outcome.faults]
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory, answerer):
    world = make_world(tmp_path_factory.mktemp("hostile") / "world")
    with Engine(answerer, "model") as world.engine:
        yield world


@pytest.fixture
def cheap(answerer, monkeypatch):
    """Let commands use a small random model, and show settings without estimates."""
    monkeypatch.setattr(Answerer, "load", classmethod(lambda cls, *args, **options: answerer))
    monkeypatch.setattr(training, "print_config", lambda words: json.dumps(parse(words).record(), default=str))


def broken(kind, seeds, folder, world):
    """Return how the invariant was broken, for each seed that did."""
    found = []
    for seed in seeds:
        (place := folder / str(seed)).mkdir()
        case = KINDS[kind](seed, place, world)
        outcome = attempt(case)
        if outcome.faults:
            found.append(describe(case, outcome))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_few(kind, tmp_path, world, cheap):
    assert broken(kind, range(FEW), tmp_path, world) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many(kind, tmp_path, world, cheap):
    assert broken(kind, range(FEW, MANY), tmp_path, world) == []


def test_a_record_with_nan_is_refused(tmp_path, world):
    file = tmp_path / "records.json"
    file.write_text(json.dumps(good_records()).replace('"id"', '"extra": NaN, "id"', 1))
    words = ["data", "check", "--data-path", str(file), "--image-folder", str(world.images), "--tokenizer"]
    words += ["bundled:llm", "--num-image-tokens", "36", "--template", "v1", "--workers", "1"]
    outcome = attempt(Case(lambda: main(words), ("records.json",), lambda out: None, tmp_path))
    assert outcome.code == 2 and not outcome.faults


def test_an_interpreter_without_docstrings_is_refused_in_words():
    words = [sys.executable, "-OO", "-m", "tove_llava", "presets"]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 2 and ended.stdout == "" and len(ended.stderr.splitlines()) == 1
    assert "PYTHONOPTIMIZE=2" in ended.stderr


@pytest.mark.slow
def test_an_interpreter_without_asserts_ends_alike(tmp_path):
    tests, codes = Path(__file__).parents[1], []
    for flags in ([], ["-O"]):
        (folder := tmp_path / f"codes{len(codes)}").mkdir()
        words = [sys.executable, *flags, "-c", _CODES, str(tests), str(tests.parent), str(folder), str(FEW), *PLAIN]
        ended = subprocess.run(words, capture_output=True, text=True, check=True)
        codes.append(json.loads(ended.stdout.splitlines()[-1]))
    assert codes[0] == codes[1]
    assert len(codes[0]) == FEW * len(PLAIN) and not any(faults for _, faults in codes[0].values())
