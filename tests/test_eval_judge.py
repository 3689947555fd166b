"""Judged benchmarks against a chat endpoint on the loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from answer_parts import picture, save_model
from score_parts import differences, refuse, sample, score, write_rows
from test_eval_layouts import LAYOUTS

from tove_llava import cli
from tove_llava.core.errors import ServiceError
from tove_llava.eval.benchmarks import get_benchmark, mmvet
from tove_llava.eval.benchmarks.llava_bench import parse_review
from tove_llava.eval.benchmarks.mmvet import parse_grade
from tove_llava.eval.judge import Judge, Request
from tove_llava.eval.rows import read_answers

pytest.importorskip("openai")


class Endpoint:
    """A chat endpoint that answers by ``reply(last message)``, after ``put_off`` refusals."""

    def __init__(self, reply):
        self.reply, self.requests, self.put_off, self.broken_after, self.lock = reply, [], 0, None, threading.Lock()
        self.refused = set()
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
                    if found := sorted(endpoint.refused & set(body)):
                        message = f"Unsupported parameter: '{found[0]}' is not supported with this model."
                        return self.send(400, {"error": {"message": message, "param": found[0]}})
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
    """Reply as the sample's expected numbers assume."""
    for answer, reply in (
        ("Answer 0.", "8 6\ngood"),
        ("Answer 1.", "6,3\nfair"),
        ("Answer 2.", "<think>8 6</think>\n4 2"),
    ):
        if f"[Assistant 2]\n{answer}\n" in text:
            return reply
    return "8 2"


def grade(text):
    if "| first |" in text:
        return "0.9 is it"
    if "| second |" in text:
        return "0.5" if "(digit)" in text else "I think"
    return "**0.4**"


REPLY = {"llava_bench": review, "mmvet": grade}


def flags_for(endpoint, tmp_path):
    return ["--judge-url", endpoint.url, "--judge-model", "m", "--judge-cache", str(tmp_path / "replies.jsonl")]


@pytest.mark.parametrize("name", REPLY)
def test_sample(capsys, serve, tmp_path, name):
    endpoint, (answers, truth, expected) = serve(REPLY[name]), sample(name)
    flags = flags_for(endpoint, tmp_path)
    endpoint.put_off = 3
    got = score(capsys, name, answers, truth, *flags)
    assert not differences(got, expected, 1e-9)
    assert got["judge"] == {"model": "m", "calls": len(endpoint.requests), "cached": 0}
    assert {request["path"] for request in endpoint.requests} == {"/v1/chat/completions"}
    asked, again = len(endpoint.requests), score(capsys, name, answers, truth, *flags)
    assert len(endpoint.requests) == asked and again["judge"] == {"model": "m", "calls": 0, "cached": asked}
    assert again["scores"] == got["scores"]


def test_llava_bench_request_is_the_reference_s(capsys, serve, tmp_path):
    endpoint, (answers, truth, _) = serve(review), sample("llava_bench")
    score(capsys, "llava_bench", answers, truth, *flags_for(endpoint, tmp_path))
    (request,) = [row for row in endpoint.requests if "Question 1?" in row["messages"][1]["content"]]
    assert request["temperature"] == 0.2 and request["max_tokens"] == 1024 and request["model"] == "m"
    assert request["messages"][0]["role"] == "system"
    text = request["messages"][1]["content"]
    parts = ("[Context]\nA picture, number 1.", "[Question]\nQuestion 1?", "[Assistant 1]\nReference 1.")
    parts += ("[End of Assistant 1]", "[Assistant 2]\nAnswer 1.", "[End of Assistant 2]", "[System]\nWe would like to")
    assert text.startswith("\n\n".join(parts))
    assert text.endswith("does not affect your judgment.\n\n")


def test_mmvet_asks_again_at_higher_temperatures(capsys, serve, tmp_path):
    endpoint, (answers, truth, _) = serve(grade), sample("mmvet")
    score(capsys, "mmvet", answers, truth, *flags_for(endpoint, tmp_path))
    texts = [row["messages"][0]["content"] for row in endpoint.requests]
    assert any(text.endswith("\nQuestion 0? | x <AND> y | first | ") for text in texts)
    silent = serve(lambda text: None)
    talk = mmvet.conversation({"question": "Q?", "answer": "x"}, "third")
    assert Judge(silent.url, "m", tmp_path / "silent.jsonl", retries=0).hold([talk]) == [None]
    assert [row["temperature"] for row in silent.requests] == [0.0, 0.0, 0.5, 1.0, 1.5]
    assert [row["max_tokens"] for row in silent.requests] == [3] + [1024] * 4  # room for thoughts or reasons


@pytest.mark.parametrize("name", REPLY)
def test_without_a_judge_there_is_no_number(capsys, serve, name):
    got = score(capsys, name, *sample(name)[:2])
    assert got["scores"] == {} and got["count"] == 4
    assert "--judge-url" in got["unavailable"]["scores"]


def test_environment_names_the_judge_and_its_key(capsys, serve, tmp_path, monkeypatch):
    endpoint, (answers, truth, _) = serve(grade), sample("mmvet")
    predictions = tmp_path / "answers.jsonl"
    predictions.write_bytes(answers.read_bytes())
    for name, value in (("URL", endpoint.url), ("MODEL", "org/m"), ("KEY", "secret-key")):
        monkeypatch.setenv(f"TOVE_JUDGE_{name}", value)
    score(capsys, "mmvet", predictions, truth)
    assert endpoint.requests[0]["key"] == "Bearer secret-key"
    cache = tmp_path / "answers.jsonl.judge-org_m.jsonl"
    assert cache.exists() and "secret-key" not in cache.read_text()


def test_estimate_comes_first_and_costs_nothing(capsys, serve, tmp_path):
    endpoint, (answers, truth, _) = serve(grade), sample("mmvet")
    flags = [*flags_for(endpoint, tmp_path), "--judge-price", "1e6,1e6", "--judge-estimate"]
    text = score(capsys, "mmvet", answers, truth, *flags)["unavailable"]["scores"]
    assert "3 calls to make" in text and "at most 9 to write" in text
    assert not endpoint.requests and not list(tmp_path.iterdir())
    tokens = int(text.split("about ")[1].split()[0])
    assert f"{tokens + 9:.2f} at most" in text  # one for a token, by the prices above


def test_a_failed_run_continues_where_it_stopped(capsys, serve, tmp_path):
    endpoint, (answers, truth, expected) = serve(review), sample("llava_bench")
    flags, cache = flags_for(endpoint, tmp_path), tmp_path / "replies.jsonl"
    endpoint.broken_after = 2
    message = refuse(capsys, "llava_bench", answers, truth, *flags)
    assert "who are you?" in message and str(cache) in message
    kept = cache.read_text()
    assert len(kept.splitlines()) == 2
    cache.write_text(kept + '{"key": "cut o')  # as a kill leaves it
    endpoint.broken_after = None
    got = score(capsys, "llava_bench", answers, truth, *flags)
    assert got["judge"]["calls"] == 2 and got["judge"]["cached"] == 2
    assert not differences(got, expected, 1e-9)


def test_no_endpoint_and_no_chat_completion_are_errors(serve, tmp_path):
    def talk():
        return (yield Request(({"role": "user", "content": "hello"},), 0.0, 1))

    dead = Judge("http://127.0.0.1:9/v1", "m", tmp_path / "a.jsonl", retries=0)
    with pytest.raises(ServiceError, match="127.0.0.1:9"):
        dead.hold([talk()])


def exam(tmp_path, name, count):
    """Write ``count`` questions of a judged benchmark with answers."""
    keys = range(count)
    answers = write_rows(
        tmp_path / "a.jsonl", ({"question_id": k, "prompt": "?", "text": f"answer {k}."} for k in keys)
    )
    if name == "mmvet":
        truth = tmp_path / "mm-vet.json"
        rows = {f"v1_{k}": {"question": "?", "answer": "x", "capability": ["rec"]} for k in keys}
        truth.write_text(json.dumps(rows))
        return answers, truth
    rows = [{"question_id": k, "image": "1.jpg", "category": "conv", "text": f"Question {k}?"} for k in keys]
    truth = write_rows(tmp_path / "questions.jsonl", rows)
    write_rows(tmp_path / "context.jsonl", [{"image": "1.jpg", "caption": "A cat."}])
    write_rows(tmp_path / "answers_gpt4.jsonl", ({"question_id": k, "text": "A cat."} for k in keys))
    return answers, truth


@pytest.mark.parametrize(("name", "good", "first"), [("mmvet", "0.5", "v1_0"), ("llava_bench", "8 4", 0)])
def test_unread_replies_are_counted_and_more_than_a_tenth_are_an_error(capsys, serve, tmp_path, name, good, first):
    bad = ["answer 0."]
    endpoint = serve(lambda text: "" if any(word in text for word in bad) else good)
    flags, files = flags_for(endpoint, tmp_path), exam(tmp_path, name, 11)
    got = score(capsys, name, *files, *flags)
    assert got["unparsed_replies"] == [first] and got["count"] == 11
    assert (
        cli.main(["score", "--benchmark", name, "--predictions", str(files[0]), "--ground-truth", str(files[1])]) == 0
    )
    capsys.readouterr()
    bad.append("answer 7.")
    (tmp_path / "replies.jsonl").unlink()
    message = refuse(capsys, name, *files, *flags)
    assert "2 of 11 replies of the judge m could not be read" in message and "replies.jsonl" in message


@pytest.mark.parametrize("refused", [{"temperature"}, {"max_tokens"}, {"temperature", "max_tokens"}])
def test_a_judge_is_asked_without_what_it_refuses(capsys, serve, tmp_path, refused):
    endpoint = serve(grade)
    endpoint.refused = refused
    answers, truth, expected = sample("mmvet")
    got = score(capsys, "mmvet", answers, truth, *flags_for(endpoint, tmp_path))
    assert not differences(got, expected, 1e-9) and got["judge"]["left_out"] == sorted(refused)
    for request in endpoint.requests:
        assert not refused & set(request) and ("max_completion_tokens" in request) == ("max_tokens" in refused)


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("mmvet", ["--judge-url", "http://127.0.0.1:9/v1"], "an address and a model"),
        ("mmvet", ["--judge-model", "m"], "an address and a model"),
        ("mmvet", ["--judge-url", "u", "--judge-model", "m", "--judge-price", "3"], "two numbers"),
        ("vsr", ["--judge-url", "u", "--judge-model", "m"], "without a judge"),
    ],
)
def test_half_a_judge_or_one_too_many_is_refused(capsys, serve, name, flags, words):
    assert words in refuse(capsys, name, *sample(name)[:2], *flags)


@pytest.mark.parametrize(("text", "pair"), [("8 7\nGood.", (8, 7)), ("8.5,7", (8.5, 7))])
def test_reviews(text, pair):
    assert parse_review(text) == pair


# Once the comma is a space, "8, 7" has two of them: the reference cannot read it either.
@pytest.mark.parametrize("text", ["8, 7", "Scores: 8 7", "nan 7", ""])
def test_reviews_without_two_numbers(text):
    assert parse_review(text) == (-1, -1)


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("1.0 .", 1.0), ("1.1", None), ("nan", None), ("", None)])
def test_grades(text, value):
    assert parse_grade(text) == value


@pytest.mark.parametrize(
    "text", ["0.8\n\nbecause", "**0.8**", "Score: 0.8", "<think>1.0?</think>\n0.8", "0.8/1.0", "0.8."]
)
def test_grades_in_other_forms(text):
    assert parse_grade(text) == 0.8


@pytest.mark.parametrize("text", ["8/10", "I think 0.8", "<think>0.8", "0.8-0.9", "Score: 10"])
def test_no_grades(text):
    assert parse_grade(text) is None


def test_a_grade_that_may_be_cut_is_none():
    assert parse_grade("Score: 0", cut=True) is None and parse_grade("Score: 1") == 1.0 == parse_grade("1", cut=True)


def test_questions_of_ones_own_are_judged(capsys, serve, tmp_path):
    endpoint = serve(lambda text: "**1.0**" if text.endswith("| A cat. | ") else "Score: 0.5")
    rows = [{"question": "What is it?", "answer": ["a cat", "cat"]}, {"question": "What is it?", "answer": "a dog"}]
    questions = write_rows(tmp_path / "mine.jsonl", rows)
    answers = [{"question_id": key, "text": text} for key, text in enumerate(("A cat.", "A dog?"))]
    files = ["--questions", questions, "--predictions", write_rows(tmp_path / "answers.jsonl", answers)]
    command = ["score", "--rule", "judge", "--json", *files, *flags_for(endpoint, tmp_path)]
    assert cli.main([str(argument) for argument in command]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["scores"] == {"grade": 0.75} and got["rule"] == "judge" and got["judge"]["calls"] == 2
    asked = [request["messages"][0]["content"] for request in endpoint.requests]  # in any order
    assert any(text.endswith("What is it? | a cat <OR> cat | A cat. | ") for text in asked)


def test_a_run_hands_its_answers_to_the_judge(capsys, serve, tmp_path):
    model, out = save_model(tmp_path), tmp_path / "out"
    LAYOUTS["llava_bench"](tmp_path / "data")
    for question in get_benchmark("llava_bench").questions(tmp_path / "data"):
        question.image.parent.mkdir(exist_ok=True)
        picture(1).save(question.image, "PNG")

    def evaluate(*flags):
        data = ["--data-root", str(tmp_path / "data"), "--output", str(out), "--device", "cpu", "--max-new-tokens", "3"]
        code = cli.main(["eval", "--model", str(model), "--benchmark", "llava_bench", *data, *flags])
        return code, capsys.readouterr()

    for flags, words in (
        (["--judge-model", "m"], "an address and a model"),
        (["--benchmark", "scenes", "--judge-url", "u", "--judge-model", "m"], "without a judge"),
    ):
        code, said = evaluate(*flags)
        assert code == 2 and words in said.err and not out.exists()
    assert "unavailable (no judge; give --judge-url" in evaluate()[1].out
    endpoint = serve(review)
    flags = ["--judge-url", endpoint.url, "--judge-model", "m", "--json"]
    for calls in (4, 0):  # the second time its replies are next to the answers
        found = json.loads(evaluate(*flags)[1].out)["benchmarks"]["llava_bench"]["full"]
        assert found["judge"] == {"model": "m", "calls": calls, "cached": 4 - calls}
        assert found["questions_answered"] == 0
        assert found["scores"]["all"]["relative_percent"] == 25.0
    folder = out / "llava_bench" / "full"
    asked = "\n".join(request["messages"][-1]["content"] for request in endpoint.requests)
    assert all(f"[Assistant 2]\n{row['text']}\n" in asked for row in read_answers(folder / "answers.jsonl"))
    assert (folder / "answers.jsonl.judge-m.jsonl").is_file()
