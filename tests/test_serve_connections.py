"""The endpoint under clients that are slow, leave, or are many."""

import contextlib
import json
import random
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from answer_parts import before_forward, make_answerer, picture

httpx = pytest.importorskip("httpx")
for _library in ("fastapi", "uvicorn"):
    pytest.importorskip(_library)

from endpoint_parts import body, data_url, post, serving, user  # noqa: E402

from tove_llava.inference.engine import Engine, Message  # noqa: E402
from tove_llava.serve import connections, openai_api  # noqa: E402
from tove_llava.serve.openai_api import CHAT  # noqa: E402

LONG = 400  # tokens


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    return make_answerer(tmp_path_factory.mktemp("endpoint"))


@pytest.fixture
def engine(answerer):
    with Engine(answerer, name="my-model", max_batch=4, max_waiting=4) as engine:
        yield engine


@pytest.fixture
def port(engine):
    with serving(engine) as port:
        yield port


@pytest.fixture
def steps(answerer, monkeypatch):
    """Hold the model before each step while the event is clear; collect the steps' numbers of rows."""
    go = threading.Event()
    go.set()
    go.rows = []

    def wait(ids):
        if ids.shape[1] == 1:
            go.rows.append(len(ids))
            assert go.wait(60)

    before_forward(answerer, monkeypatch, wait)
    yield go
    go.set()


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def opened(port, sent):
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(sent)
    return connection


def received(connection):
    """Return all that comes until the connection is closed."""
    parts = []
    while part := connection.recv(10_000):
        parts.append(part)
    return b"".join(parts)


def head(length, path=CHAT):
    return f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {length}\r\n\r\n".encode()


def test_slow_connections_lock_nobody_out_and_are_closed(port, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 3.0)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(opened(port, head(100) + b"{")) for _ in range(64)]
        slow += [stack.enter_context(opened(port, b"P")) for _ in range(64)]
        assert post(port, body()).status_code == 200
        answers = [received(connection) for connection in slow]
        assert all(answer.startswith(b"HTTP/1.1 408 ") and b'{"error"' in answer for answer in answers[:64])
        assert set(answers[64:]) == {b""}, "a request that never begins is only closed"


def test_a_body_that_comes_by_drops_is_cut(port, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.5)
    with opened(port, head(100)) as connection:
        for _ in range(50):
            if select.select([connection], [], [], 0.1)[0]:
                break
            connection.sendall(b"x")
        else:
            pytest.fail("it is still read")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_what_is_no_http_is_a_json_error(port):
    with opened(port, b"\x00\xff\r\n\r\n") as connection:
        head, _, content = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and json.loads(content)["error"]["type"] == "invalid_request_error"


def test_bodies_are_bounded(port, monkeypatch):
    monkeypatch.setattr(connections, "MAX_BODY", 2**20)
    for sent in (
        head(2**20 + 1),
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n110000\r\n" + b"x" * 0x110000,
    ):
        with opened(port, sent) as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    monkeypatch.undo()
    monkeypatch.setattr(connections, "MAX_HELD", 3 * 2**20)
    with opened(port, head(2**22) + b"x" * 2**21) as first, opened(port, head(2**22) + b"x" * 2**21) as second:
        ready = select.select([first, second], [], [], 60)[0]
        assert [connection.recv(1000)[:13] for connection in ready] == [b"HTTP/1.1 503 "]
        monkeypatch.setattr(connections, "MAX_HELD", 0)
        assert post(port, body()).status_code == 200, "small requests are read all the same"
        monkeypatch.setattr(connections, "MAX_HELD", 3 * 2**20)
    until(lambda: post(port, body(text="x" * 2**21 + "y")).status_code == 400)  # what was held is free again


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_when_its_client_leaves(engine, port, steps, stream):
    content = json.dumps(body(max_tokens=LONG, stream=stream)).encode()
    running = [opened(port, head(len(content)) + content) for _ in range(4)]
    until(lambda: engine.worker.running == 4)
    steps.clear()
    if stream:
        assert running[0].recv(10_000).startswith(b"HTTP/1.1 200 ")
    waiting = opened(port, head(len(content)) + content)
    until(lambda: engine.worker.waiting == 1)
    waiting.close()
    until(lambda: engine.worker.waiting == 0)
    for connection in running:
        connection.close()
    until(lambda: engine.worker.running == 0)
    steps.set()
    assert post(port, body()).status_code == 200
    assert len(steps.rows) < LONG


def test_clients_share_a_batch_and_a_full_queue_is_refused(engine, port, steps):
    questions = [f"{'xyzw'[n % 4] * (n + 3)} is number {n}?" for n in range(5)]
    steps.clear()
    with ThreadPoolExecutor(5) as pool:
        asked = []
        for question in questions:
            asked.append(pool.submit(post, port, body(text=question, max_tokens=16)))
            until(lambda: engine.worker.running == 1 and engine.worker.waiting == len(asked) - 1)
        for stream in (False, True):
            refused = post(port, body(stream=stream))
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert "waiting already" in refused.json()["error"]["message"]
        steps.set()
        texts = [each.result().json()["choices"][0]["message"]["content"].strip() for each in asked]
    assert max(steps.rows) == 4
    alone = [engine.answer([Message("user", question)], max_new_tokens=16) for question in questions]
    assert texts == alone and len(set(alone)) == 5


def test_an_engine_that_ends_says_so(engine, port):
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(post, port, body(max_tokens=LONG))
        streamed = pool.submit(post, port, body(max_tokens=LONG, stream=True))
        until(lambda: engine.worker.running == 2)
        engine.close(0)
        assert whole.result().status_code == 503 and "shut down" in whole.result().json()["error"]["message"]
        last = streamed.result().text.strip().split("\n\n")[-1]
    assert "shut down" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert post(port, body()).status_code == 503


def test_a_fault_of_the_program_is_a_json_error(port, engine, monkeypatch, capfd):
    monkeypatch.setattr(engine, "prepare", lambda *args: 1 / 0)
    answer = post(port, body())
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"


def hostile(port, number):
    """Send what no client should; return the status, None for a connection that is cut."""
    big = data_url(raw=b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 200)
    bodies = [
        body(text="word " * 200_000), body(temperature=-1), body(seed=2**70), body(big), body(*[data_url()] * 120),
        body(messages=[{"role": "zzz", "content": "x"}]), body(max_tokens="x"), body(text="\ud800"), body(model="x"),
    ]  # fmt: skip
    kind = number % (len(bodies) + 3)
    if kind < len(bodies):
        content = json.dumps(bodies[kind]).encode()
        answer = httpx.post(f"http://127.0.0.1:{port}{CHAT}", content=content, timeout=300)
        assert 400 <= answer.status_code < 500 and "message" in answer.json()["error"], answer.text
        return answer.status_code
    content = json.dumps(body(data_url(), max_tokens=LONG, stream=True)).encode()
    sent = [b"\x00\xff" * 500, head(len(content)) + content[:50], head(len(content)) + content][kind - len(bodies)]
    with opened(port, sent):
        time.sleep(random.random() / 2)
    return None


def resident():
    """Return the memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.slow
def test_fifty_clients_with_a_tenth_hostile_lose_and_mix_nothing(answerer):
    clients, rounds = 50, 20
    memory, errors, latencies = [], [], []
    with Engine(answerer, name="my-model") as engine, serving(engine) as port:
        questions = [f"{'xyzw'[n % 4] * (n + 3)} is number {n}?" for n in range(10)]
        files = [data_url(picture(n)) for n in range(3)]
        expected = {
            (question, n): engine.answer([Message("user", question, [picture(n)])], max_new_tokens=16)
            for question in questions
            for n in range(3)
        }
        assert len(set(expected.values())) == 30, "a mixed answer would show"

        def client(number):
            chance = random.Random(number)
            for turn in range(rounds):
                if (number * rounds + turn) % 10 == 0:
                    hostile(port, (number * rounds + turn) // 10)
                    continue
                question, n, stream = chance.choice(questions), chance.randrange(3), chance.random() < 0.5
                began = time.monotonic()
                content = body(files[n], text=question, max_tokens=16, stream=stream)
                answer = post(port, content)
                while answer.status_code == 503:
                    time.sleep(float(answer.headers["retry-after"]) * chance.random())
                    answer = post(port, content)
                assert answer.status_code == 200, answer.text
                if stream:
                    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
                    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
                else:
                    text = answer.json()["choices"][0]["message"]["content"]
                latencies.append(time.monotonic() - began)
                assert text.strip() == expected[question, n]
            memory.append(resident())

        with ThreadPoolExecutor(clients) as pool:
            for future in [pool.submit(client, number) for number in range(clients)]:
                try:
                    future.result()
                except Exception as error:
                    errors.append(error)
        assert not errors, errors[:3]
        assert len(latencies) == clients * rounds * 9 // 10
        assert post(port, body()).status_code == 200
    latencies.sort()
    print(f"answers {len(latencies)}, median {latencies[len(latencies) // 2]:.2f} s, longest {latencies[-1]:.2f} s, ",
          f"MB {memory[0]:.0f} to {resident():.0f}")  # fmt: skip
    assert resident() < memory[0] + 150


def test_answers_that_are_not_read_are_cut(engine, port, steps, monkeypatch):
    monkeypatch.setattr(openai_api, "_event", lambda content: "data: " + "x" * 2**20 + "\n\n")
    monkeypatch.setattr(connections, "PATIENCE", 1.0)
    content = json.dumps(body(max_tokens=LONG, stream=True, messages=[user("What?")])).encode()
    with opened(port, head(len(content)) + content):
        until(lambda: len(steps.rows) > 30)  # more than the buffers take
        steps.clear()
        until(lambda: engine.worker.running == 0, 20)
    assert len(steps.rows) < LONG, "it had not ended by itself"
