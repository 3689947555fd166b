"""``tove-llava chat``: one answer, and a conversation with commands."""

import json
import os
import re
import signal
import threading
import time

import pytest
from answer_parts import ask, picture, save_model

from tove_llava import cli
from tove_llava.inference.engine import Engine, Message, Sampling
from tove_llava.serve.commands import COMMANDS

TOKENS = 8


@pytest.fixture(scope="module")
def engine(answerer):
    return Engine(answerer)


@pytest.fixture
def files(tmp_path):
    picture().save(tmp_path / "a.png")
    return tmp_path


def talk(answerer, monkeypatch, capsys, *lines, flags=()):
    """Type lines; return the output after the greeting, and standard error."""
    typed = iter([*lines, ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(typed))
    monkeypatch.setattr(Engine, "load", lambda *args, **kwargs: Engine(answerer, "tiny"))
    code = cli.main(["chat", "--model", str(os.path.dirname(__file__)), "--max-new-tokens", str(TOKENS), *flags])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out.split("\n", 1)[1], err


def test_one_answer_as_text_and_as_json(tmp_path, files, capsys, engine):
    model = save_model(tmp_path / "saved")
    arguments = ["chat", "--model", str(model), "--image", str(files / "a.png"), "--device", "cpu"]
    arguments += ["--max-new-tokens", str(TOKENS), "--question", "What is it?"]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["answer"] == engine.answer(ask("What is it?", picture()), max_new_tokens=TOKENS)
    assert sum(result["routing"][0].values()) == pytest.approx(1, abs=1e-5)
    assert result["experts"] == ["depth", "edge", "normal"] and 1 <= result["tokens"] <= TOKENS
    assert 0 < result["tower_seconds"] <= result["first_token_seconds"] <= result["seconds"]
    assert cli.main([*arguments, "--experts", "edge", "--system", "Be brief."]) == 0
    options = {"experts": ["edge"], "system": "Be brief.", "max_new_tokens": TOKENS}
    assert capsys.readouterr().out.strip() == engine.answer(ask("What is it?", picture()), **options)


def test_a_line_that_is_no_utf8_is_typed_again(monkeypatch, capsys, answerer):
    _, err = talk(answerer, monkeypatch, capsys, "na\udcefve", "/help")
    assert err == "that line is not UTF-8 text; type it again\n"


def test_json_needs_a_question(capsys):
    assert cli.main(["chat", "--json", "--model", "x"]) == 2
    assert "--json needs --question" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--experts", "depht"], "unknown expert.*depht.*depth, edge, normal"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "3"], "top_p is 3"),
    ],
)
def test_wrong_flags_are_explained(answerer, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(Engine, "load", lambda *args, **kwargs: Engine(answerer))
    assert cli.main(["chat", "--model", str(os.path.dirname(__file__)), "--question", "Hi", *flags]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_conversation_over_several_turns(answerer, engine, files, monkeypatch, capsys):
    lines = ("/image no.png", f"/image {files / 'a.png'}", "What is it?", "And?", "/reset", "Hello")
    out, err = talk(answerer, monkeypatch, capsys, *lines)
    assert "no image file no.png" in err
    first = engine.answer(ask("What is it?", picture()), max_new_tokens=TOKENS)
    chat = [*ask("What is it?", picture()), Message("assistant", first), *ask("And?")]
    second, third = (engine.answer(messages, max_new_tokens=TOKENS) for messages in (chat, ask("Hello")))
    for text in ("1 image(s)", first, second, "a new conversation", third):
        assert text in out
        out = out.split(text, 1)[1]


def test_experts_and_the_system_prompt_change_what_is_said(answerer, engine, files, monkeypatch, capsys):
    flags = ("--image", str(files / "a.png"))

    def said(**options):
        return engine.answer(ask("What is it?", picture()), max_new_tokens=TOKENS, **options)

    expected = {
        (): said(),
        ("/detach depth,normal",): said(experts=["edge"]),
        ("/detach depth normal edge", "/attach normal"): said(experts=["normal"]),
        ("/system Be rude.",): said(system="Be rude."),
        ("/system Be rude.", "/system"): said(),
    }
    assert len(set(expected.values())) == 4
    for commands, answer in expected.items():
        out, _ = talk(answerer, monkeypatch, capsys, *commands, "What is it?", flags=flags)
        assert out.rstrip("\n").endswith(answer)
    out, _ = talk(answerer, monkeypatch, capsys, "/detach edge", "/experts")
    assert out.count("depth (attached), edge (detached), normal (attached)") == 2


def test_routing_is_drawn_with_the_experts_that_are_attached(answerer, engine, files, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    drawn, second = files / "out.png", files / "2.png"
    lines = [f"/routing {drawn}", f"/image {files / 'a.png'}", "/detach depth", f"/routing {drawn}"]
    lines += [f"/routing {drawn}", "/routing x.txt", "/detach edge,normal", f"/routing {second}"]
    out, err = talk(answerer, monkeypatch, capsys, *lines)
    assert drawn.stat().st_size > 1000 and f"written: {drawn}" in out and "depth 0.000" in out
    means = engine.routing(picture(), experts=["edge", "normal"]).means
    assert f"edge {means['edge']:.3f}" in out
    for words in ("there is no image yet", f"{drawn} exists", "needs a file to write", "nothing is routed"):
        assert words in err


def test_wrong_commands_are_explained_and_change_nothing(answerer, monkeypatch, capsys):
    out, err = talk(answerer, monkeypatch, capsys, "/rotuing x", "/detach", "/attach thermal", "/image", "/experts")
    assert "unknown command '/rotuing'. Did you mean '/routing'?" in err
    assert "/detach needs an expert's name" in err and "unknown expert(s) thermal" in err and "/image needs" in err
    assert out.strip() == "depth (attached), edge (attached), normal (attached)"


def test_help_lists_every_command(answerer, monkeypatch, capsys):
    out, _ = talk(answerer, monkeypatch, capsys, "/help")
    lines = out.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in COMMANDS if name != "/new")


def test_ctrl_c_stops_the_answer_and_not_the_program(answerer, engine, monkeypatch, capsys):
    started = threading.Event()
    real = Engine.ask

    def asked(self, messages, *args, **options):
        reply = real(self, messages, *args, **options)
        if messages[-1].text == "Talk":
            started.reply = reply
            started.set()
        return reply

    def interrupt():
        assert started.wait(timeout=300)
        while started.reply.timing is None or started.reply.timing.tokens < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setitem(vars(answerer), "end_ids", [])  # no answer ends by itself
    monkeypatch.setattr(Engine, "ask", asked)
    thread = threading.Thread(target=interrupt)
    thread.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        out, err = talk(answerer, monkeypatch, capsys, "Talk", "/reset", "Hello", flags=("--max-new-tokens", "400"))
        thread.join(timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "(stopped)" in err and started.reply.timing.tokens < 390
    assert out.rstrip("\n").endswith(engine.ask(ask("Hello"), Sampling(400)).text())
