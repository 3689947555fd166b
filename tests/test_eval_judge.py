"""Judged benchmarks against a chat endpoint on the loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from answer_parts import picture, save_model
from score_parts import SAMPLES, differences, refuse, score, truth_file
from test_eval_layouts import LAYOUTS

from tove_llava import cli
from tove_llava.core.errors import ServiceError
from tove_llava.eval.benchmarks import get_benchmark
from tove_llava.eval.benchmarks.llava_bench import parse_review
from tove_llava.eval.benchmarks.mmvet import parse_grade
from tove_llava.eval.judge import Judge, Request
from tove_llava.eval.rows import read_answers

pytest.importorskip("openai")


class Endpoint:
    """A chat endpoint: answers by ``reply(text of the last message)``, after ``put_off`` refusals of each kind."""

    def __init__(self, reply):
        self.reply, self.requests, self.put_off, self.broken_after, self.lock = reply, [], 0, None, threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    if endpoint.put_off:
                        endpoint.put_off -= 1
                        return self.send(429, {"error": {"message": "slow down"}}, {"retry-after-ms": "5"})
                    if endpoint.broken_after is not None and len(endpoint.requests) >= endpoint.broken_after:
                        return self.send(401, {"error": {"message": "who are you?"}})
                    endpoint.requests.append({**body, "path": self.path, "key": self.headers["Authorization"]})
                text = endpoint.reply(body["messages"][-1]["content"])
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                kind = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
                self.send(200, {**kind, "choices": [choice]})

            def send(self, code, value, headers=None):
                content = json.dumps(value).encode()
                self.send_response(code)
                for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    for name in ("TOVE_JUDGE_URL", "TOVE_JUDGE_MODEL", "TOVE_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    started = []

    def start(reply):
        started.append(Endpoint(reply))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.server.shutdown()
        endpoint.server.server_close()


def review(text):
    """What the sample's expected numbers assume."""
    for answer, reply in (("Answer 0.", "8 6\ngood"), ("Answer 1.", "6,3\nfair"), ("Answer 2.", "no scores here")):
        if f"[Assistant 2]\n{answer}\n" in text:
            return reply
    return "8 2"


def grade(text):
    if "| first |" in text:
        return "0.9 is it"
    if "| second |" in text:
        return "0.5" if "(digit)" in text else "I think"
    return "no"


REPLY = {"llava_bench": review, "mmvet": grade}


@pytest.mark.parametrize("name", REPLY)
def test_sample(capsys, serve, tmp_path, name):
    endpoint, folder = serve(REPLY[name]), SAMPLES / name
    flags = ["--judge-url", endpoint.url, "--judge-model", "m", "--judge-cache", str(tmp_path / "replies.jsonl")]
    endpoint.put_off = 3
    got = score(capsys, name, folder / "predictions.jsonl", truth_file(folder), *flags)
    assert not differences(got, json.loads((folder / "expected.json").read_text()), 1e-9)
    assert got["judge"] == {"model": "m", "calls": len(endpoint.requests), "cached": 0}
    assert {request["path"] for request in endpoint.requests} == {"/v1/chat/completions"}
    # The second run asks nothing.
    asked = len(endpoint.requests)
    again = score(capsys, name, folder / "predictions.jsonl", truth_file(folder), *flags)
    assert len(endpoint.requests) == asked and again["judge"] == {"model": "m", "calls": 0, "cached": asked}
    assert again["scores"] == got["scores"]


def test_llava_bench_request_is_the_reference_s(capsys, serve, tmp_path):
    endpoint, folder = serve(review), SAMPLES / "llava_bench"
    flags = ["--judge-url", endpoint.url, "--judge-model", "m", "--judge-cache", str(tmp_path / "replies.jsonl")]
    score(capsys, "llava_bench", folder / "predictions.jsonl", truth_file(folder), *flags)
    (request,) = [row for row in endpoint.requests if "Question 1?" in row["messages"][1]["content"]]
    assert request["temperature"] == 0.2 and request["max_tokens"] == 1024 and request["model"] == "m"
    assert request["messages"][0]["role"] == "system"
    text = request["messages"][1]["content"]
    assert text.startswith(
        "[Context]\nA picture, number 1.\n\n[Question]\nQuestion 1?\n\n[Assistant 1]\nReference 1.\n\n"
        "[End of Assistant 1]\n\n[Assistant 2]\nAnswer 1.\n\n[End of Assistant 2]\n\n[System]\nWe would like to request"
    )
    assert text.endswith("does not affect your judgment.\n\n")


def test_mmvet_asks_again_with_more_warmth(capsys, serve, tmp_path):
    endpoint, folder = serve(grade), SAMPLES / "mmvet"
    flags = ["--judge-url", endpoint.url, "--judge-model", "m", "--judge-cache", str(tmp_path / "replies.jsonl")]
    score(capsys, "mmvet", folder / "predictions.jsonl", truth_file(folder), *flags)
    texts = [row["messages"][0]["content"] for row in endpoint.requests]
    assert any(text.endswith("\nQuestion 0? | x <AND> y | first | ") for text in texts)
    third = [row for row in endpoint.requests if "| third |" in row["messages"][0]["content"]]
    assert [row["temperature"] for row in third] == [0.0, 0.0, 0.5, 1.0, 1.5]
    assert all(row["max_tokens"] == 3 for row in third)


@pytest.mark.parametrize("name", REPLY)
def test_without_a_judge_there_is_no_number(capsys, serve, name):
    folder = SAMPLES / name
    got = score(capsys, name, folder / "predictions.jsonl", truth_file(folder))
    assert got["scores"] == {} and got["count"] == 4
    assert "--judge-url" in got["unavailable"]["scores"]


def test_environment_names_the_judge_and_its_key(capsys, serve, tmp_path, monkeypatch):
    endpoint, folder = serve(grade), SAMPLES / "mmvet"
    predictions = tmp_path / "answers.jsonl"
    predictions.write_bytes((folder / "predictions.jsonl").read_bytes())
    monkeypatch.setenv("TOVE_JUDGE_URL", endpoint.url)
    monkeypatch.setenv("TOVE_JUDGE_MODEL", "org/m")
    monkeypatch.setenv("TOVE_JUDGE_KEY", "secret-key")
    score(capsys, "mmvet", predictions, truth_file(folder))
    assert endpoint.requests[0]["key"] == "Bearer secret-key"
    cache = tmp_path / "answers.jsonl.judge-org_m.jsonl"
    assert cache.exists() and "secret-key" not in cache.read_text()


def test_estimate_comes_first_and_costs_nothing(capsys, serve, tmp_path):
    endpoint, folder = serve(grade), SAMPLES / "mmvet"
    cache = tmp_path / "replies.jsonl"
    flags = ["--judge-url", endpoint.url, "--judge-model", "m", "--judge-cache", str(cache), "--judge-price", "1e6,1e6"]
    got = score(capsys, "mmvet", folder / "predictions.jsonl", truth_file(folder), *flags, "--judge-estimate")
    text = got["unavailable"]["scores"]
    assert "3 calls to make" in text and "at most 9 to write" in text and not endpoint.requests and not cache.exists()
    tokens = int(text.split("about ")[1].split()[0])
    assert f"{tokens + 9:.2f} at most" in text  # one for a token, by the prices above


def test_a_failing_run_is_taken_up_where_it_stopped(capsys, serve, tmp_path):
    endpoint, folder = serve(review), SAMPLES / "llava_bench"
    cache = tmp_path / "replies.jsonl"
    flags = ["--judge-url", endpoint.url, "--judge-model", "m", "--judge-cache", str(cache)]
    endpoint.broken_after = 2
    message = refuse(capsys, "llava_bench", folder / "predictions.jsonl", truth_file(folder), *flags)
    assert "who are you?" in message and str(cache) in message
    kept = cache.read_text()
    assert len(kept.splitlines()) == 2
    cache.write_text(kept + '{"key": "cut o')  # as a kill leaves it
    endpoint.broken_after = None
    got = score(capsys, "llava_bench", folder / "predictions.jsonl", truth_file(folder), *flags)
    assert got["judge"]["calls"] == 2 and got["judge"]["cached"] == 2
    assert not differences(got, json.loads((folder / "expected.json").read_text()), 1e-9)


def test_no_endpoint_and_no_chat_completion_are_told(serve, tmp_path):
    def talk():
        return (yield Request(({"role": "user", "content": "hello"},), 0.0, 1))

    dead = Judge("http://127.0.0.1:9/v1", "m", tmp_path / "a.jsonl", retries=0)
    with pytest.raises(ServiceError, match="127.0.0.1:9"):
        dead.hold([talk()])
    silent = Judge(serve(lambda text: None).url, "m", tmp_path / "b.jsonl", retries=0)
    with pytest.raises(ServiceError, match="empty reply"):
        silent.hold([talk(), talk()])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--judge-url", "http://127.0.0.1:9/v1"], "an address and a model"),
        (["--judge-model", "m"], "an address and a model"),
        (["--judge-url", "u", "--judge-model", "m", "--judge-price", "3"], "two numbers"),
    ],
)
def test_half_a_judge_is_refused(capsys, serve, flags, words):
    folder = SAMPLES / "mmvet"
    assert words in refuse(capsys, "mmvet", folder / "predictions.jsonl", truth_file(folder), *flags)


def test_a_judge_for_a_benchmark_without_one_is_refused(capsys, serve):
    folder = SAMPLES / "vsr"
    flags = ["--judge-url", "u", "--judge-model", "m"]
    assert "without a judge" in refuse(capsys, "vsr", folder / "predictions.jsonl", truth_file(folder), *flags)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("8 7\nGood.", (8, 7)),
        ("8.5,7", (8.5, 7)),
        ("8, 7", (-1, -1)),  # two spaces once the comma is one: the reference cannot read it either
        ("Scores: 8 7", (-1, -1)),
        ("nan 7", (-1, -1)),
        ("", (-1, -1)),
    ],
)
def test_reviews(text, pair):
    assert parse_review(text) == pair


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("1.0 .", 1.0), ("1.1", None), ("nan", None), ("", None)])
def test_grades(text, value):
    assert parse_grade(text) == value


# -- with a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def evaluate(model, root, output, *flags):
    data = ["--data-root", str(root), "--output", str(output), "--device", "cpu", "--max-new-tokens", "3"]
    return cli.main(["eval", "--model", str(model), "--benchmark", "llava_bench", *data, *flags])


def test_a_run_hands_its_answers_to_the_judge(capsys, serve, tmp_path, model):
    LAYOUTS["llava_bench"](tmp_path / "data")
    benchmark = get_benchmark("llava_bench")
    for question in benchmark.questions(tmp_path / "data"):
        question.image.parent.mkdir(exist_ok=True)
        picture(1).save(question.image, "PNG")
    assert evaluate(model, tmp_path / "data", tmp_path / "out") == 0
    assert "unavailable (no judge; give --judge-url" in capsys.readouterr().out
    endpoint = serve(review)
    flags = ["--judge-url", endpoint.url, "--judge-model", "m", "--json"]
    for calls in (4, 0):  # the second time its replies lie beside the answers
        assert evaluate(model, tmp_path / "data", tmp_path / "out", *flags) == 0
        found = json.loads(capsys.readouterr().out)["benchmarks"]["llava_bench"]["full"]
        assert found["judge"] == {"model": "m", "calls": calls, "cached": 4 - calls}
        assert found["questions_answered"] == 0
        assert found["scores"]["all"]["relative_percent"] == 25.0
    folder = tmp_path / "out" / "llava_bench" / "full"
    asked = "\n".join(request["messages"][-1]["content"] for request in endpoint.requests)
    assert all(f"[Assistant 2]\n{row['text']}\n" in asked for row in read_answers(folder / "answers.jsonl"))
    assert (folder / "answers.jsonl.judge-m.jsonl").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--judge-model", "m"], "an address and a model"),
        (["--benchmark", "scenes", "--judge-url", "u", "--judge-model", "m"], "without a judge"),
    ],
)
def test_a_run_with_half_a_judge_or_one_too_many_is_refused(capsys, serve, tmp_path, model, flags, words):
    LAYOUTS["llava_bench"](tmp_path / "data")
    for name in ("000.jpg", "001.jpg", "002.jpg"):
        (tmp_path / "data" / "llava-bench-in-the-wild" / "images").mkdir(exist_ok=True)
        picture(1).save(tmp_path / "data" / "llava-bench-in-the-wild" / "images" / name, "PNG")
    assert evaluate(model, tmp_path / "data", tmp_path / "out", *flags) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
