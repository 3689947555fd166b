"""The OpenAI-compatible endpoint: what it takes, what it refuses, and what it answers."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from queue import SimpleQueue

import pytest
import torch
from answer_parts import make_answerer, picture, save_model
from PIL import Image, features
from train_parts import ROOT, environment, free_port

from tove_llava import cli
from tove_llava.checkpoints.conversion import export_model
from tove_llava.core.errors import ConfigError
from tove_llava.inference import rolling_batch
from tove_llava.inference.engine import Engine, Message

httpx = pytest.importorskip("httpx")
for _library in ("fastapi", "uvicorn"):
    pytest.importorskip(_library)

from endpoint_parts import PICTURE, body, data_url, post, serving, user, wait_for  # noqa: E402

from tove_llava.serve import openai_api  # noqa: E402
from tove_llava.serve.chat_request import MAX_IMAGES, ChatRequest  # noqa: E402
from tove_llava.serve.openai_api import CHAT, Endpoint, Server, bind, serve_openai  # noqa: E402


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with Engine(make_answerer(tmp_path_factory.mktemp("endpoint")), name="outputs/my-model") as engine:
        yield engine


@pytest.fixture
def request_(engine):
    def send(method, path, **options):
        async def call():
            transport = httpx.ASGITransport(Endpoint(engine).app(), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    return send


@pytest.fixture
def chat(request_):
    return lambda content: request_("POST", CHAT, content=json.dumps(content))


@pytest.fixture(scope="module")
def port(engine):
    with serving(engine) as port:
        yield port


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def bomb(side):
    """Return a PNG of many equal pixels in few bytes."""
    return data_url(Image.new("1", (side, side)))


MESSAGES = [
    ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "tool_call_id"),
    ([user(), {"role": "assistant", "content": "x"}, {"role": "tool", "content": "x"}, user()], "'tool'"),
    ([{"role": "zzz", "content": "x"}, user()], "zzz"),
    ([user(), user()], "assistant's was expected"),
    ([user(), {"role": "assistant", "content": "x"}], "the last message must be the user's"),
    ([user(), {"role": "system", "content": "x"}, user()], "the system's where"),
    ([{"role": "system", "content": user("x", data_url())["content"]}, user()], "only the user's messages"),
    ([user(text="x" * 200_000)], "200000 characters long, and the model takes 600 tokens"),
    ([user(text="what? " * 150)], "1[0-9]{3} tokens long, and the model takes 600"),
    ([user(), {"role": "assistant", "content": "x"}] * 100 + [user()], "long, and the model takes 600"),
    ([user("Look at <image>")], "stands for an image"),
    ([user("half of \ud800")], r"half of a surrogate pair in 'half of"),
    ([user("   ")], "question is empty"),
    ([{"role": "user", "content": None}], r"messages\[0\].content is missing"),
    ([{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}], "video_url"),
    ([{"role": "user", "content": {"a": 1}}], r"messages\[0\].content"),
    (["hi"], r"messages\[0\]"),
    ([], "messages"),
    ("hi", "messages"),
    ([user("x", "/etc/passwd")], "data:image"),
    ([user("x", data_url(), "file:///etc/hostname")], r"content\[1\].image_url.*data:image"),
    ([user("x", data_url()), {"role": "assistant", "content": "x"}, user("y", "http://127.0.0.1:1/x.png")], "data:"),
    ([user("x", "data:image/png;base64,\u00e9")], "base64"),
    ([user("x", "data:image/png;base64,%%%")], "base64"),
    ([user("x", data_url() + ",x")], "base64"),
    ([user("x", data_url(raw=b"<svg xmlns='http://www.w3.org/2000/svg'/>"))], "not an image"),
    ([user("x", data_url()[:-200])], "damaged"),
    ([user("x", *[data_url()] * (MAX_IMAGES + 1))], "17 images"),
    ([user("x", bomb(6_400))], "more than the limit"),
    ([user("x", *[bomb(6_000)] * 6)], "216000000 pixels in all"),
]


@pytest.mark.parametrize(("messages", "words"), MESSAGES)
def test_messages_that_cannot_be_answered_are_refused(chat, engine, monkeypatch, messages, words):
    if "pixels" in words or "limit" in words:
        monkeypatch.setattr(engine, "pixels", None)  # counted before anything is decoded
    refused(chat(body(messages=messages)), 400, words)


def refused(answer, status, words, param=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(words, error["message"]), error
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert param is None or error["param"] == param


VALUES = {
    "max_tokens": ["x", 0, -1, 1.5, True],
    "max_completion_tokens": ["x", 0, 9],  # 9: max_tokens is 8
    "temperature": [-1, 2.1, "warm", float("nan"), float("inf"), 0.001],
    "top_p": [-1, 0, 5, float("nan")],
    "seed": [2**63, -(2**63) - 1, 2**70, 1.5, "x"],
    "stop": [1, [1], [""], "", ["x"] * 17],
    "stream": ["yes", 1],
    "stream_options": [1, {"include_usage": "x"}, {"zzz": 1}],
    "n": [0, 2, "1"],
    "frequency_penalty": [-2, 0.5, "x"],
    "presence_penalty": [1],
    "logit_bias": [{"5": 1}],
    "logprobs": [True],
    "top_logprobs": [3],
    "tools": [[{"type": "function"}]],
    "tool_choice": ["required"],
    "response_format": [{"type": "json_object"}, "text"],
    "user": [1],
    "model": [1],
    "chat_template_kwargs": [{"chat_template": "x"}],
}


@pytest.mark.parametrize("key", VALUES)
def test_values_out_of_type_or_range_are_refused_by_their_key(request_, key):
    for value in VALUES[key]:
        answer = request_("POST", CHAT, content=json.dumps(body(**{key: value})))
        refused(answer, 400, key if value != 9 else "differ")
        assert answer.json()["error"]["param"].startswith(key if value != 9 else "max_tokens")


def test_bodies_that_are_no_request_are_refused(request_):
    for content, words in [
        (b"{", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON|seed|model"),
        (b"[1, 2]", "not a JSON object"),
        (b"\xff\xfe{", "UTF-8"),
        (b"", "not valid JSON"),
        (b'{"model": "my-model", "messages": [], "\\ud800": 1}', "surrogate"),
        (b'{"model": "my-model", "model": "x"}', "occurs twice"),
    ]:
        refused(request_("POST", CHAT, content=content), 400, words)


def test_requests_that_wait_to_be_read_are_bounded(engine, monkeypatch):
    monkeypatch.setattr(openai_api, "READING", 1)
    monkeypatch.setattr(openai_api, "WAITING", 1)
    endpoint, go = Endpoint(engine), threading.Event()
    prepare = endpoint._prepare
    monkeypatch.setattr(endpoint, "_prepare", lambda content: go.wait(60) and prepare(content))

    async def call():
        transport = httpx.ASGITransport(endpoint.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as client:
            asked = [asyncio.ensure_future(client.post(CHAT, json=body())) for _ in range(2)]
            for _ in range(500):
                if endpoint._reading.statistics().tasks_waiting:
                    break
                await asyncio.sleep(0.01)
            asked.append(asyncio.ensure_future(client.post(CHAT, json=body())))
            await asyncio.wait(asked, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            go.set()
            return [await each for each in asked]

    *taken, late = asyncio.run(call())
    assert all(map(text_of, taken))
    refused(late, 503, "1 requests are waiting already")


def test_as_many_images_as_the_limit_are_read():
    (message,) = ChatRequest.read(json.dumps(body(*[data_url()] * MAX_IMAGES)).encode()).conversation()
    assert len(message.images) == MAX_IMAGES


def test_routes_and_models(request_, chat):
    refused(chat(body(model="gpt-4o")), 404, "gpt-4o.*my-model", "model")
    refused(request_("GET", "/v1/models/gpt-4o"), 404, "gpt-4o")
    for path in ("/load_model", "/v1/completions", "/v1/responses", "/docs", "/openapi.json", "/v1/chat/completions/"):
        refused(request_("POST", path, json={}), 404, CHAT)
    for method, path in (("GET", CHAT), ("POST", "/v1/models"), ("DELETE", "/health")):
        refused(request_(method, path), 405, CHAT)
    assert request_("GET", "/v1/models").json()["data"][0]["id"] == "my-model"
    assert request_("GET", "/v1/models/my-model").json()["object"] == "model"


HARMLESS = [
    {"n": 1, "user": "x", "stream_options": {"include_usage": True}, "tools": [], "stop": []},
    {"max_tokens": None, "max_completion_tokens": 8, "tool_choice": None, "logit_bias": {}, "logprobs": False},
    {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "response_format": {"type": "text"},
        "temperature": 0,
        "top_p": 1,
    },
    # LiteLLM's and other clients'
    {"metadata": {"trace": "1"}, "parallel_tool_calls": True, "functions": [], "function_call": None, "store": False},
    {"service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "x", "modalities": ["text"], "foo": None},
    {"top_logprobs": 0, "seed": 2**63 - 1},
    {"top_logprobs": 0, "seed": -(2**63), "max_completion_tokens": 8},
]


@pytest.mark.parametrize("changes", HARMLESS)
def test_harmless_values_are_taken(chat, engine, changes):
    expected = engine.answer([Message("user", "What is it?", [PICTURE])], max_new_tokens=8)
    assert text_of(chat(body(data_url(), **changes))).strip() == expected


def test_messages_as_clients_send_them_back(chat, engine):
    first = Message("user", "What is it?", [PICTURE])
    said = engine.answer([first], max_new_tokens=8)
    expected = engine.answer([first, Message("assistant", said), Message("user", "Where?")], max_new_tokens=8)
    nothing = dict.fromkeys(("refusal", "tool_calls", "function_call", "audio"))
    echo = {"role": "assistant", "content": said, **nothing, "annotations": [], "reasoning_content": "It may be ..."}
    messages = [user("What is it?", data_url()), echo, {"role": "user", "content": "Where?", "name": "me"}]
    assert text_of(chat(body(messages=messages))).strip() == expected


def test_developer_is_system_and_system_messages_are_joined(chat, engine):
    question = [Message("user", "What is it?")]
    expected = engine.answer(question, max_new_tokens=8, system="Be brief.\n\nBe kind.")
    assert expected != engine.answer(question, max_new_tokens=8)
    systems = [{"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be kind."}]
    assert text_of(chat(body(messages=[*systems, user()]))).strip() == expected


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "WEBP", "GIF", "JPEG2000", "AVIF", "PPM"])
def test_images_of_every_format_are_read(chat, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")
    plain = Image.new("RGB", (40, 30), (200, 200, 200))
    expected = text_of(chat(body(data_url(plain))))
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    assert text_of(chat(body(data_url(plain, kind, **options)))) == expected


def script(engine, monkeypatch, text):
    """Have the model say this."""
    ids = [*engine.answerer.tokenizer.encode(text, add_special_tokens=False), engine.answerer.end_ids[0]]

    def says(logits, rows, end_ids):
        return torch.tensor([ids[min(len(row.tokens), len(ids) - 1)] for row in rows])

    monkeypatch.setattr(rolling_batch, "next_tokens", says)


def events(answer):
    """Return a stream's chunks; it has to end as OpenAI's."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("changes", "said", "ending", "tokens"),
    [
        ({}, "one, two, one, two", "stop", 19),
        ({"stop": "two"}, "one, ", "stop", 8),
        ({"stop": ["zzz", "o, one", ", two,"]}, "one", "stop", 9),
        ({"stop": ["twofold", "two!"]}, "one, two, one, two", "stop", 19),
        ({"max_tokens": 6}, "one, t", "length", 6),
        ({"max_tokens": 6, "stop": "two"}, "one, t", "length", 6),
        ({"max_tokens": 18}, "one, two, one, two", "length", 18),
    ],
)
def test_stops_and_endings_are_the_same_in_a_stream(chat, engine, monkeypatch, changes, said, ending, tokens):
    script(engine, monkeypatch, "one, two, one, two")
    request = body() | {"max_tokens": 50} | changes
    whole = chat(request).json()
    choice, usage = whole["choices"][0], whole["usage"]
    assert (choice["message"]["content"], choice["finish_reason"], usage["completion_tokens"]) == (said, ending, tokens)
    assert usage["total_tokens"] == usage["prompt_tokens"] + tokens
    *chunks, last = events(chat(request | {"stream": True, "stream_options": {"include_usage": True}}))
    assert last["choices"] == [] and last["usage"] == usage
    assert {chunk["id"] for chunk in chunks} == {last["id"]} and all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == said and deltas[0]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [ending]
    assert not any("usage" in chunk for chunk in events(chat(request | {"stream": True})))


def test_a_think_block_is_shown_only_if_asked_for(chat, engine, monkeypatch):
    script(engine, monkeypatch, "<think>It is red.</think>\nA ball.")
    for stream in (False, True):
        for asked, seen in ((False, None), (True, "It is red.")):
            answer = chat(body(max_tokens=50, stream=stream, include_reasoning=asked))
            if stream:
                parts = [chunk["choices"][0]["delta"] for chunk in events(answer)]
            else:
                parts = [answer.json()["choices"][0]["message"]]
            assert "".join(part.get("content", "") for part in parts) == "A ball."
            assert parts[-1].get("reasoning_content") == seen and "red" not in json.dumps(parts[:-1])


def test_a_seed_repeats_a_drawn_answer(chat):
    drawn = [text_of(chat(body(temperature=2, seed=seed, max_tokens=20))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_official_client_gets_the_engine_s_answers(engine, port):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
    (served,) = [entry.id for entry in client.models.list()]
    messages = [user("What is it?", data_url())]
    expected = engine.answer([Message("user", "What is it?", [PICTURE])], max_new_tokens=24)
    answer = client.chat.completions.create(model=served, messages=messages, max_tokens=24)
    assert answer.choices[0].message.content.strip() == expected
    stream = client.chat.completions.create(
        model=served, messages=messages, max_completion_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == answer.choices[0].message.content and sum(map(bool, pieces)) > 1
    assert last.usage == answer.usage
    with pytest.raises(openai.BadRequestError, match="temperature") as failed:
        client.chat.completions.create(model=served, messages=messages, temperature=-1)
    assert failed.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="my-model"):
        client.chat.completions.create(model="gpt-4o", messages=messages)


def test_flags_and_addresses_are_checked_before_a_model_is_loaded(tmp_path, capsys):
    assert cli.main(["serve", "--model", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen.*--port"):
        serve_openai(tmp_path, "127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="cannot listen.*--port"):
        serve_openai(tmp_path, "127.0.0.1", 70_000)


def test_an_export_with_experts_opens_as_its_model(tmp_path):
    model, question = save_model(tmp_path), [Message("user", "What is it?", [picture(3)])]
    export_model(model, tmp_path / "export", "remote-code")
    with Engine.load(model, "cpu") as engine, Engine.load(tmp_path / "export", "cpu") as exported:
        assert exported.answer(question, max_new_tokens=8) == engine.answer(question, max_new_tokens=8)
        assert exported.experts == engine.experts


def test_a_step_that_hangs_does_not_hold_up_a_signal(engine, monkeypatch):
    codes = SimpleQueue()
    monkeypatch.setattr(openai_api.os, "_exit", codes.put)
    monkeypatch.setattr(openai_api, "ENDING", 0.01)
    with bind("127.0.0.1", 0) as bound:
        server = Server(engine, bound)
        server.handle_exit(signal.SIGTERM, None)
        assert codes.get(timeout=30) == 143 and server.should_exit


def test_the_command_serves_a_folder_and_ends_in_time(tmp_path):
    model = save_model(tmp_path).rename(tmp_path / "my-model")
    with Engine.load(model, "cpu") as engine:
        expected = engine.answer([Message("user", "What is it?", [picture(3)])], max_new_tokens=8)
    port, log = free_port(), tmp_path / "serve.log"
    command = [sys.executable, "-m", "tove_llava", "serve", "--device", "cpu", "--port", str(port), "--model"]
    command += [str(model), "--plugin", str(ROOT / "tests" / "tower_parts.py")]
    with open(log, "w") as file:
        server = subprocess.Popen(command, env=environment(HF_HUB_OFFLINE="1"), cwd=ROOT, stdout=file, stderr=file)
    try:
        wait_for(port, lambda: server.poll() is None, log)
        assert text_of(post(port, body(data_url(picture(3))))).strip() == expected
        slow = socket.create_connection(("127.0.0.1", port))
        slow.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{".encode())
        with httpx.stream("POST", f"http://127.0.0.1:{port}{CHAT}", json=body(max_tokens=400, stream=True)) as answer:
            next(answer.iter_lines())
            server.send_signal(signal.SIGTERM)
            began = time.monotonic()
            code = server.wait(timeout=30)
        assert time.monotonic() - began < 3
        assert code in (130, 143), log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        server.kill()
