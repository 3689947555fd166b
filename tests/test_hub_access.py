"""Models of the hub, through the command line; a hub that does not answer."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hub_stub import HubStub
from huggingface_hub import is_offline_mode

import tove_llava
from tove_llava.core import hub_access
from tove_llava.core.errors import CheckpointError


@pytest.fixture
def online(monkeypatch):
    """A process that may ask the hub, and waits one second."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "_silent", (-60.0, ""))
    monkeypatch.setattr(hub_access, "LIMIT", 1)
    hub_access._say.cache_clear()


def verb(hub, home, *words):
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    command = [sys.executable, "-m", "tove_llava", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_verbs_take_a_model_of_the_hub(kinds, tmp_path):
    with HubStub() as hub:
        files = {file.name: file.read_bytes() for file in (kinds / "full").iterdir() if file.is_file()}
        hub.repositories["me/full"] = files | {"evil.py": b"1 / 0", "pytorch_model.bin": b"pickled"}
        asked = verb(hub, tmp_path / "home", "chat", "--model", "hf:me/full", "--question", "What?", "--json")
        assert asked.returncode == 0, asked.stderr
        assert json.loads(asked.stdout)["model"] == "hf:me/full"
        assert asked.stderr.count(f"asking {hub.url} for me/full") == 1
        assert not [*(tmp_path / "home").rglob("*.py"), *(tmp_path / "home").rglob("*.bin")]
        absent = verb(hub, tmp_path / "home", "eval", "--model", "hf:me/absent", "--benchmark", "scenes")
        assert absent.returncode == 2 and "hf:me/absent cannot be fetched" in absent.stderr


OPENED = {
    "load_model": lambda: tove_llava.load_model("hf:a/b"),
    "load_tower": lambda: tove_llava.load_tower("a/b"),
    "from_pretrained": lambda: tove_llava.ToveLlavaForConditionalGeneration.from_pretrained("a/b"),
    "language": lambda: tove_llava.build_model("tiny", overrides=["language.source=hf:a/b"]),
}


@pytest.mark.parametrize("route", OPENED)
def test_a_hub_that_does_not_answer_costs_one_wait(route, online, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises((CheckpointError, OSError)):
            OPENED[route]()
        assert time.monotonic() - started < 8
    assert not is_offline_mode() and socket.getdefaulttimeout() is None
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tove-llava: ")]
    assert len(lines) == 2 and "asking http://127.0.0.1" in lines[0] and "only its cache is read" in lines[1]


def test_nothing_is_asked_or_said_offline(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_access, "answer", lambda _: pytest.fail("asks"))
    with hub_access.asking("a/offline"):
        assert is_offline_mode()
    assert is_offline_mode() and capsys.readouterr().err == ""


def test_one_process_of_many_says_that_it_asks(online, monkeypatch, capsys):
    monkeypatch.setattr(hub_access, "answer", lambda _: 200)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        hub_access._say.cache_clear()
        with hub_access.asking("a/b"):
            assert not is_offline_mode()
        assert capsys.readouterr().err.count("for a/b") == (rank == "0")


def test_a_name_server_that_never_answers_costs_one_wait(online, monkeypatch):
    end = threading.Event()
    monkeypatch.setattr(hub_access, "LIMIT", 0.1)
    monkeypatch.setattr(hub_access, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: end.wait(5)))
    started = time.monotonic()
    assert hub_access.answer("a/b") is None and time.monotonic() - started < 4
    assert "nothing in 0.1 s" in hub_access.silence()
    end.set()
