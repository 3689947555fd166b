"""The OpenAI-compatible endpoint: its guard, and a separate process's answers."""

import asyncio
import base64
import io
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from answer_parts import picture
from PIL import Image
from tower_parts import open_output
from train_parts import ROOT, environment, free_port

from tove_llava import build_model, cli
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.checkpoints.saving import save_checkpoint
from tove_llava.core.errors import ConfigError
from tove_llava.inference.engine import Engine, Message
from tove_llava.serve import guard
from tove_llava.serve.guard import CHAT, Guard

httpx = pytest.importorskip("httpx")


def data_url(image=None, raw=None, kind="png"):
    buffer = io.BytesIO()
    if raw is None:
        (picture() if image is None else image).save(buffer, "PNG")
    return f"data:image/{kind};base64,{base64.b64encode(raw if raw is not None else buffer.getvalue()).decode()}"


def body(url=None, text="What is it?", **more):
    parts = [] if url is None else [{"type": "image_url", "image_url": {"url": url}}]
    return {"model": "m", "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **more}


async def inner(scope, receive, send):
    """Echo the request, as a stand-in for the server."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def request(method, path, **options):
    async def send():
        transport = httpx.ASGITransport(app=Guard(inner, "the-model"))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def test_a_chat_goes_through_as_it_is():
    sent = body(data_url(), max_tokens=7)
    answer = request("POST", CHAT, json=sent)
    assert answer.status_code == 200 and answer.json() == sent
    assert request("POST", CHAT, json=body() | {"messages": [{"role": "user", "content": "Hi"}]}).status_code == 200
    assert request("GET", "/v1/models").json()["data"][0]["id"] == "the-model"


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/completions", "/v1/responses", "/docs"])
def test_what_a_chat_does_not_need_is_not_there(path):
    answer = request("POST", path, json={"model": "another/model"})
    assert answer.status_code == 404 and CHAT in answer.json()["error"]["message"]


def bomb(side):
    """Return a PNG of many equal pixels in few bytes."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (body("/etc/passwd"), "data:image"),
        (body("file:///etc/hostname"), "data:image"),
        (body("http://127.0.0.1:1/x.png"), "data:image"),
        (body("data:image/png;base64,/etc/passwd"), "not an image|base64"),
        (body("data:image/png;base64,%%%"), "not valid base64"),
        (body(data_url() + ",x"), "data:image"),
        (body(data_url(raw=b"<html></html>", kind="jpeg")), "not an image"),
        (body(data_url(raw=b"<svg xmlns='http://www.w3.org/2000/svg'/>", kind="svg+xml")), "not an image"),
        (body(data_url(raw=bomb(12_000))), "more than the limit"),
        (body(text="Look at <image>"), "stands for an image"),
        (body(chat_template_kwargs={"chat_template": "x"}), "chat_template_kwargs"),
        ({"messages": []}, "no list of messages"),
        ([1, 2], "no list of messages"),
        ({"messages": ["hi"]}, "an object with a role"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "a text or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]}, "video_url"),
    ],
)
def test_what_is_no_chat_is_refused_with_a_reason(sent, words):
    answer = request("POST", CHAT, json=sent)
    assert answer.status_code == 400
    assert re.search(words, answer.json()["error"]["message"])


def test_what_is_not_json_or_too_much_is_refused(monkeypatch):
    for content in (b"{", b"[" * 200_000):
        assert "not JSON" in request("POST", CHAT, content=content).json()["error"]["message"]
    many = body(data_url()) | {"messages": [body(data_url())["messages"][0]] * 17}
    assert "17 images" in request("POST", CHAT, json=many).json()["error"]["message"]
    monkeypatch.setattr(guard, "MAX_BODY", 2**20)
    answer = request("POST", CHAT, content=b"x" * (2**20 + 1))
    assert answer.status_code == 413 and "1 MB" in answer.json()["error"]["message"]
    monkeypatch.setattr(guard, "WAITING", 0)
    assert request("POST", CHAT, json=body()).status_code == 503


def test_flags_and_addresses_are_checked_before_a_model_is_loaded(tmp_path, capsys):
    from tove_llava.serve.openai_api import serve_openai

    with pytest.raises(SystemExit):
        cli.main(["serve", "--load-4bit", "--model", str(tmp_path)])
    assert "--load-4bit" in capsys.readouterr().err
    assert cli.main(["serve", "--model", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    need_server()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen.*--port"):
        serve_openai(tmp_path, "127.0.0.1", taken.getsockname()[1], "cpu")


QUESTIONS = ("What is it?", "Describe the picture.")


def need_server():
    return [pytest.importorskip(name) for name in ("fastapi", "uvicorn", "openai")][-1]


def save_bundled(folder):
    """Save a model of the bundled parts, with random trained parts."""
    model, processor = build_model("tiny", seed=0)
    torch.manual_seed(0)
    open_output(model.tower, scale=2.0)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(4)
    language = {"source": "bundled:llm", "dtype": "float32"}
    manifest = Manifest("full", "finetune", "tiny", "v1", "pad", 512, language)
    save_checkpoint(folder, model, processor, manifest, dict(model.state_dict()))
    return folder


@pytest.mark.slow
def test_a_model_with_experts_answers_as_the_engine_does(tmp_path):
    openai = need_server()
    model = save_bundled(tmp_path / "my-model")
    with Engine.load(model, "cpu") as engine:

        def alone(*messages, **options):
            return engine.answer(list(messages), max_new_tokens=24, **options)

        asked = [Message("user", question, [picture()]) for question in QUESTIONS]
        expected = [alone(question) for question in asked]
        assert expected[1] != alone(asked[1], experts=()), "the experts matter"
        second = alone(asked[0], Message("assistant", expected[0]), Message("user", "And where?"))

    port = free_port()
    command = [sys.executable, "-m", "tove_llava", "serve", "--device", "cpu", "--port", str(port)]
    log = tmp_path / "serve.log"
    with open(log, "w") as file:
        server = subprocess.Popen(
            [*command, "--model", str(model)],
            env=environment(HF_HUB_OFFLINE="1", TMPDIR=str(tmp_path)), cwd=ROOT, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        wait_for(port, server, log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=900, max_retries=0)
        (served,) = [entry.id for entry in client.models.list()]
        assert served == "my-model"

        def ask(messages, **options):
            return client.chat.completions.create(model=served, messages=messages, max_tokens=24, **options)

        chats = [body(data_url(), question)["messages"] for question in QUESTIONS]
        texts = [ask(messages).choices[0].message.content.strip() for messages in chats]
        assert texts == expected
        pieces = [chunk.choices[0].delta.content or "" for chunk in ask(chats[1], stream=True) if chunk.choices]
        assert "".join(pieces).strip() == expected[1] and sum(map(bool, pieces)) > 1
        more = [{"role": "assistant", "content": expected[0]}, {"role": "user", "content": "And where?"}]
        assert ask([*chats[0], *more]).choices[0].message.content.strip() == second
        for url in (str(ROOT / "docs" / "assets" / "x.png"), "http://127.0.0.1:1/x.png"):
            with pytest.raises(openai.BadRequestError, match="data:image"):
                ask(body(url)["messages"])
        assert ask(chats[0]).choices[0].message.content.strip() == expected[0], "and it goes on"
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(timeout=300)
    assert code in (0, 130), log.read_text()[-2000:]
    assert not list(tmp_path.glob("tove-llava-*")), "what was written to serve it is gone"


def wait_for(port, server, log):
    for _ in range(900):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(f"the server did not come up: {log.read_text()[-3000:]}")
