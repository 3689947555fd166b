"""The page's endpoints without a browser, and a hostile client's attacks."""

import html
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import aclosing, contextmanager
from pathlib import Path

import anyio
import httpx
import pytest
from abuse_parts import FILES, HTML, SVG
from answer_parts import ask, before_forward, make_answerer, picture, save_model
from PIL import Image

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data.images import open_image
from tove_llava.inference.engine import Engine, Message, Sampling

gradio_app = pytest.importorskip("tove_llava.serve.gradio_app")
pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")

from tove_llava.serve.ui import session as sessions  # noqa: E402
from tove_llava.serve.ui.auth import read_auth  # noqa: E402
from tove_llava.serve.ui.conversation import Message as Shown  # noqa: E402
from tove_llava.serve.ui.conversation import shown  # noqa: E402
from tove_llava.serve.ui.running import Running  # noqa: E402
from tove_llava.serve.ui.session import Session, Settings  # noqa: E402

QUESTION = "What is <b>it</b>? <script>document.title='broken'</script>"
TOKENS = 8
WITH_TEST_EXPERTS = "import sys, tower_parts, tove_llava.cli; sys.exit(tove_llava.cli.main(['demo']))"


@pytest.fixture(scope="module")
def engine(answerer):
    with Engine(answerer, name="tiny") as engine:
        yield engine


@contextmanager
def launched(engine, **options):
    app = gradio_app.launch(engine, "127.0.0.1", None, block=False, **{"max_new_tokens": TOKENS, **options})
    try:
        yield app
    finally:
        app.close()


@pytest.fixture(scope="module")
def app(engine, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # a server that ends takes files along that another shows too
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        with launched(engine) as app:
            yield app


@pytest.fixture
def chat(app):
    connection = client.Client(app.local_url, verbose=False)
    yield connection
    connection.close()


def save(folder, index=0):
    file = folder / f"{index}.png"
    picture(index).save(file)
    return client.handle_file(str(file))


def message(text, *files):
    return {"text": text, "files": list(files)}


def said(engine, **options):
    """Answer "What is it?" about the first image by the engine."""
    return engine.answer(ask("What is it?", picture()), **{"max_new_tokens": TOKENS, **options})


def test_answers_stream_and_are_the_engines(chat, engine, tmp_path):
    answer, timing = chat.submit(message=message(QUESTION, save(tmp_path)), api_name="/chat").result(timeout=120)
    assert answer == engine.answer(ask(QUESTION, picture()), max_new_tokens=TOKENS) != ""
    assert timing["images"] == 1 and timing["tower"] > 0 and 0 < timing["tokens"] <= TOKENS


def test_the_second_turn_knows_the_first(chat, engine, tmp_path):
    first, _ = chat.predict(message=message("What is it?", save(tmp_path)), api_name="/chat")
    second, _ = chat.predict(message=message("And?", save(tmp_path, 1)), api_name="/chat")
    messages = [*ask("What is it?", picture()), Message("assistant", first), *ask("And?", picture(1))]
    assert second == engine.answer(messages, max_new_tokens=TOKENS)


def test_experts_and_settings_are_those_of_the_question(chat, engine, tmp_path):
    asked, options = message("What is it?", save(tmp_path)), {"system": "Say little.", "max_new_tokens": 5}
    answer, timing = chat.predict(message=asked, experts=["depth"], **options, api_name="/chat")
    assert answer == said(engine, experts=("depth",), **options)
    assert answer != said(engine, max_new_tokens=5) and timing["tokens"] <= 5
    with pytest.raises(client.exceptions.AppError, match="not in the list of choices"):
        chat.predict(message=asked, experts=["smell"], api_name="/chat")


def test_the_routing_of_an_image_by_chosen_experts(chat, engine, tmp_path):
    drawing, weights = chat.predict(picture=save(tmp_path), experts=["depth", "edge"], opacity=1, api_name="/routing")
    expected = engine.routing(picture(), ("depth", "edge"))
    assert weights["means"] == pytest.approx(expected.means) and weights["grids"].keys() == expected.grids.keys()
    assert sum(weights["means"].values()) == pytest.approx(1, abs=1e-4)
    with Image.open(drawing) as image:
        assert len(image.convert("RGB").getcolors()) <= 2, "two experts, two colours"
    drawing, weights = chat.predict(picture=save(tmp_path), experts=[], api_name="/routing")
    assert weights is None and drawing


def test_two_sets_of_experts_answer_the_same_question(chat, engine, tmp_path):
    asked = message("What is it?", save(tmp_path))
    found = chat.predict(message=asked, experts_a=["depth"], experts_b=[], api_name="/compare")
    for side, experts in zip(found, (("depth",), ()), strict=True):
        assert side["answer"] == said(engine, experts=experts)
        assert side["experts"] == list(experts) and side["timing"]["tokens"] > 0


def test_two_models_answer_the_same_question(engine, tmp_path):
    answerer = make_answerer(tmp_path / "other")
    answerer.model.lm_head.weight.data.neg_()
    with Engine(answerer, name="other") as other:
        with launched(engine, compare=other) as app:
            connection = client.Client(app.local_url, verbose=False)
            found = connection.predict(message=message("What is it?", save(tmp_path)), api_name="/compare")
            connection.close()
        expected = [said(engine), said(other)]
    assert [side["answer"] for side in found] == expected and expected[0] != expected[1]


def test_endpoints_are_three_and_documented(chat):
    endpoints = chat.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/chat", "/routing", "/compare"}
    assert all(entry["description"] for entry in endpoints.values())
    names = [parameter["parameter_name"] for parameter in endpoints["/chat"]["parameters"]]
    assert names == ["message", "system", "temperature", "top_p", "max_new_tokens", "experts"]
    assert all(parameter["parameter_has_default"] for parameter in endpoints["/chat"]["parameters"][1:])


@pytest.mark.parametrize("kind", [*FILES])
def test_files_that_are_no_image_are_refused_and_the_next_question_is_answered(chat, engine, tmp_path, kind):
    name, content, says = FILES[kind]
    (tmp_path / name).write_bytes(content())
    asked = message("What?", client.handle_file(str(tmp_path / name)))
    if says is None:
        assert chat.predict(message=asked, api_name="/chat")[1]["tokens"] > 0
    else:
        with pytest.raises(client.exceptions.AppError, match=says) as error:
            chat.predict(message=asked, api_name="/chat")
        assert str(tmp_path) not in str(error.value) and "uploads" not in str(error.value), "no folder is named"
    chat.reset_session()
    assert chat.predict(message=message("What is it?", save(tmp_path)), api_name="/chat")[0] == said(engine)


def test_a_bomb_takes_no_memory():
    name, content, _ = FILES["data-bomb"]
    data = content()
    tracemalloc.start()
    open_image(io.BytesIO(data), name=name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 << 20


def test_long_and_empty_questions_are_refused(chat):
    for text, options, words in (
        ("x" * 10_000, {}, "10000 characters; at most 8000"),
        (" ", {}, "empty"),
        ("x", {"system": "x" * 9000}, "the system prompt has 9000"),
    ):
        with pytest.raises(client.exceptions.AppError, match=words):
            chat.predict(message=message(text), **options, api_name="/chat")


def test_images_are_limited_in_number_and_pixels(engine, tmp_path, monkeypatch):
    session = Session()
    with pytest.raises(DataError, match="9 images"):
        session.question(engine, message("x", *["a.png"] * 9))
    monkeypatch.setattr("tove_llava.serve.ui.session.MAX_PIXELS", 100)
    picture().save(tmp_path / "a.png")
    with pytest.raises(DataError, match="^a.png has 40 x 30 pixels, more than the limit of 100"):
        session.question(engine, message("x", str(tmp_path / "a.png")))


def test_an_image_is_decoded_once(engine, tmp_path, monkeypatch):
    decoded, real, file = [], sessions.open_image, str(tmp_path / "a.png")
    picture().save(file)
    monkeypatch.setattr(sessions, "open_image", lambda *args, **kwargs: decoded.append(args) or real(*args, **kwargs))
    session = Session()

    async def answer():
        asked = [session.question(engine, message("What is it?", file))]
        async with aclosing(session.ask(engine, asked, Settings(Sampling(TOKENS)))) as answers:
            return [each.message.text async for each in answers][-1]

    assert anyio.run(answer) == anyio.run(answer) == said(engine)
    assert len(decoded) == 1


def test_messages_are_text_and_never_html(app):
    name = "<img src=x onerror=alert(1)>.png"
    stored = upload(app, name, HTML)
    events = call(app, message("What?", {"path": stored, "orig_name": name, "meta": {"_type": "gradio.FileData"}}))
    assert "event: error" in events and "<img" not in events and "<script" not in events


def upload(app, name, content):
    response = httpx.post(f"{app.local_url}gradio_api/upload", files={"files": (name, content)}, timeout=60)
    (stored,) = response.json()
    return stored


def call(app, message):
    posted = httpx.post(f"{app.local_url}gradio_api/call/v2/chat", json={"message": message}, timeout=60)
    assert posted.status_code == 200, posted.text
    return httpx.get(f"{app.local_url}gradio_api/call/chat/{posted.json()['event_id']}", timeout=60).text


def test_a_server_file_cannot_be_read_by_name(app, tmp_path):
    secret = tmp_path / "secret.png"
    picture().save(secret)
    # By hand: gradio's own client would upload the file.
    events = call(app, message("What?", {"path": str(secret), "meta": {"_type": "gradio.FileData"}}))
    assert "event: error" in events and "event: complete" not in events
    for name in (str(secret), "/etc/passwd", "../../../../etc/passwd"):
        assert httpx.get(f"{app.local_url}gradio_api/file={name}").status_code in (403, 404)


def test_a_path_as_file_name_stays_in_the_folder_of_uploads(app):
    stored = upload(app, "../../../../etc/passwd", b"nobody")
    assert ".." not in stored and not stored.startswith("/etc/") and "/uploads" in stored


@pytest.mark.parametrize("name, content", [("x.svg", SVG), ("x.html", HTML)])
def test_uploads_are_never_shown_as_pages(app, name, content):
    response = httpx.get(f"{app.local_url}gradio_api/file={upload(app, name, content)}")
    assert response.headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize("megabytes", [21, 100])
def test_uploads_are_limited_in_bytes(app, megabytes):
    try:
        files = {"files": ("big.png", bytes(megabytes << 20))}
        response = httpx.post(f"{app.local_url}gradio_api/upload", files=files, timeout=120)
        assert response.status_code == 413
    except httpx.WriteError:
        pass  # the server hung up before it had all
    assert httpx.get(f"{app.local_url}config").status_code == 200


def test_page_is_private_and_shows_text_as_text(app):
    assert app.local_url.startswith("http://127.0.0.1:") and app.share_url is None
    config = httpx.get(f"{app.local_url}config").json()
    chatbots = [entry["props"] for entry in config["components"] if entry["type"] == "chatbot"]
    assert len(chatbots) == 3 and all(c["render_markdown"] is False and c["sanitize_html"] for c in chatbots)
    assert config["analytics_enabled"] is False and config["run_history"] is False


def test_a_client_that_leaves_in_mid_stream_frees_its_row(answerer, engine, tmp_path, monkeypatch):
    slow = threading.Event()
    before_forward(answerer, monkeypatch, lambda ids: slow.wait(0.1))
    with launched(engine, max_new_tokens=400) as app:
        stays = client.Client(app.local_url, verbose=False)
        asked = message("What is it?", save(tmp_path))
        other = stays.submit(message=asked, max_new_tokens=TOKENS, api_name="/chat")
        url = f"{app.local_url}gradio_api/call"
        posted = httpx.post(f"{url}/v2/chat", json={"message": message("Talk")}, timeout=60)
        with httpx.stream("GET", f"{url}/chat/{posted.json()['event_id']}", timeout=60) as stream:
            next(stream.iter_lines())
        for _ in range(600):
            if engine.worker.running == 0 and other.done():
                break
            time.sleep(0.1)
        assert engine.worker.running == 0, "400 tokens take 40 seconds"
        answer, _ = other.result(timeout=60)
        slow.set()
        assert answer == said(engine)
        stays.close()


def test_a_waiting_client_sees_its_number_in_the_queue(answerer, monkeypatch):
    began, opened = threading.Event(), threading.Event()
    before_forward(answerer, monkeypatch, lambda ids: began.set() or opened.wait(timeout=300))

    async def last() -> list[Shown]:
        turns = []
        answers = Session().ask(engine, [Shown("user", "Who?")], Settings(Sampling(TOKENS)))
        async with aclosing(answers):
            async for answer in answers:
                turns.append(answer.message)
                opened.set()
        return turns

    with Engine(answerer, max_batch=1) as engine:
        first = engine.ask(ask("What?"), Sampling(TOKENS))
        assert began.wait(timeout=300)
        turns = anyio.run(last)
        assert turns[0] == Shown("assistant", "", note="waiting, number 1 in the queue")
        assert turns[-1].text and "first token" in turns[-1].note and first.text()


def test_a_visitor_who_stops_before_the_answer_began_is_faster_than_it(engine):
    for end in (Running.stop, Running.leave):
        running = Running()
        number = running.begin()
        end(running)
        reply = engine.ask(ask("Talk"), Sampling(400))
        running.take(number, reply)
        reply.text()
        assert reply.timing is None or reply.timing.tokens < 390
        assert running.is_current(number) == (end is Running.stop)
    assert running.begin() != number and not running.stopped


def test_a_taken_port_is_explained(app, engine):
    port = int(app.local_url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--port"):
        gradio_app.launch(engine, "127.0.0.1", port, block=False)


def test_a_password_is_asked_for(engine, tmp_path):
    with launched(engine, auth=[("ann", "secret")]) as app:
        assert httpx.get(f"{app.local_url}config").status_code == 401
        assert httpx.post(f"{app.local_url}gradio_api/call/v2/chat", json={"message": {}}).status_code == 401
        wrong = httpx.post(f"{app.local_url}login", data={"username": "ann", "password": "guess"})
        right = httpx.post(f"{app.local_url}login", data={"username": "ann", "password": "secret"})
        assert (wrong.status_code, right.status_code) == (400, 200)


def test_passwords_come_from_the_flag_or_a_file(tmp_path):
    file = tmp_path / "users"
    file.write_text("ann:a:b\n\nbob:c\n")
    assert read_auth(None) is None and read_auth("ann:secret") == [("ann", "secret")]
    assert read_auth(f"@{file}") == [("ann", "a:b"), ("bob", "c")]
    file.write_text("ann:a\nhunter2\n")
    with pytest.raises(ConfigError, match="users, line 2: expected user:password") as error:
        read_auth(f"@{file}")
    assert "hunter2" not in str(error.value)
    for given in ("ann", ":x", "ann:", "@/nowhere"):
        with pytest.raises(ConfigError, match="--auth"):
            read_auth(given)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_starts_with_the_newest_model_and_leaves_nothing_behind(tmp_path, number):
    (tmp_path / "outputs").mkdir()
    save_model(tmp_path / "outputs")
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment.pop("GRADIO_TEMP_DIR", None)
    process = subprocess.Popen(
        [sys.executable, "-uc", WITH_TEST_EXPERTS], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # tests may run in a background
    )  # fmt: skip
    try:
        read = []
        for line in process.stdout:
            read.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        assert found, "".join(read)
        connection = client.Client(found[0], verbose=False)
        asked = message("What is it?", save(tmp_path))
        assert connection.predict(message=asked, max_new_tokens=4, api_name="/chat")[1]["tokens"] > 0
        connection.close()
        assert any((tmp_path / "temporary").rglob("0.png")), "uploads are there while it runs"
        process.send_signal(number)
        rest = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in rest, rest
    assert not list((tmp_path / "temporary").iterdir())


def test_what_is_written_is_never_html():
    for role in ("user", "assistant"):
        (entry,) = shown([Shown(role, QUESTION)])
        assert "<" not in entry["content"] and html.unescape(entry["content"]) == QUESTION
    _, note = shown([Shown("assistant", "x", note=QUESTION)])
    assert note["content"].count("<") == 2, "only the span"


def test_images_are_shown_before_their_text():
    entries = shown([Shown("user", "one", ("a.png", "b.png")), Shown("assistant", "two")])
    contents = [entry["content"] for entry in entries]
    assert [c["path"] for c in contents[:2]] == ["a.png", "b.png"] and contents[2:] == ["one", "two"]
