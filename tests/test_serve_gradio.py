import html

import httpx
import pytest
from answer_parts import make_answerer, picture

from tove_llava.errors import ConfigError, DataError
from tove_llava.serve.engine import Engine, Message

gradio_app = pytest.importorskip("tove_llava.serve.gradio_app")
pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")

QUESTION = "What is <b>it</b>? <script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(make_answerer(tmp_path_factory.mktemp("model")), name="tiny")


@pytest.fixture(scope="module")
def app(engine):
    app = gradio_app.launch(engine, "127.0.0.1", None, max_new_tokens=8, block=False)
    yield app
    app.close()


@pytest.fixture
def chat(app):
    connection = client.Client(app.local_url, verbose=False)
    yield connection
    connection.close()


def answer_in(result):
    """The text of the last message on the page."""
    (_, page) = result
    content = page[-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    return html.unescape(text).strip()


def save(folder, index=0):
    file = folder / f"{index}.png"
    picture(index).save(file)
    return client.handle_file(str(file))


def test_answers_stream_and_are_the_engines(chat, engine, tmp_path):
    job = chat.submit(message={"text": QUESTION, "files": [save(tmp_path)]}, api_name="/chat")
    assert answer_in(job.result(timeout=60)) == engine.answer(
        [Message("user", QUESTION, (picture(),))], max_new_tokens=8
    )


def test_the_second_turn_knows_the_first(chat, engine, tmp_path):
    first = answer_in(chat.predict(message={"text": "What is it?", "files": [save(tmp_path)]}, api_name="/chat"))
    second = answer_in(chat.predict(message={"text": "And?", "files": [save(tmp_path, 1)]}, api_name="/chat"))
    messages = [
        Message("user", "What is it?", (picture(),)),
        Message("assistant", first),
        Message("user", "And?", (picture(1),)),
    ]
    assert second == engine.answer(messages, max_new_tokens=8)


def test_a_file_that_is_no_picture_is_an_explained_error(chat, tmp_path):
    file = tmp_path / "broken.png"
    file.write_bytes(b"not a picture")
    with pytest.raises(client.exceptions.AppError, match="not a picture"):
        chat.predict(message={"text": "What?", "files": [client.handle_file(str(file))]}, api_name="/chat")


def test_a_server_file_cannot_be_read_by_name(app, tmp_path):
    secret = tmp_path / "secret.png"
    picture().save(secret)
    # By hand: gradio's own client would upload the file.
    entry = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    call = httpx.post(f"{app.local_url}gradio_api/call/chat", json={"data": [{"text": "What?", "files": [entry]}]})
    events = httpx.get(f"{app.local_url}gradio_api/call/chat/{call.json()['event_id']}", timeout=30).text
    assert "event: error" in events and "event: complete" not in events
    assert httpx.get(f"{app.local_url}gradio_api/file={secret}").status_code == 403


def test_page_is_private_and_shows_text_as_text(app):
    assert app.local_url.startswith("http://127.0.0.1:") and app.share_url is None
    config = httpx.get(f"{app.local_url}config").json()
    (chatbot,) = [entry["props"] for entry in config["components"] if entry["type"] == "chatbot"]
    assert chatbot["render_markdown"] is False and chatbot["sanitize_html"] is True
    assert config["analytics_enabled"] is False


def test_uploads_are_limited_in_bytes(app, tmp_path):
    file = {"files": ("big.png", b"0" * (21 * 2**20))}
    response = httpx.post(f"{app.local_url}gradio_api/upload", files=file, timeout=60)
    assert response.status_code == 413


def test_a_taken_port_is_explained(app, engine):
    port = int(app.local_url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--port"):
        gradio_app.launch(engine, "127.0.0.1", port, block=False)


# -- gradio's messages ------------------------------------------------------------------------------------------------


def test_what_is_written_is_never_html():
    for role in ("user", "assistant"):
        (entry,) = gradio_app.shown([gradio_app.Said(role, QUESTION)])
        assert "<" not in entry["content"] and html.unescape(entry["content"]) == QUESTION


def test_pictures_are_shown_in_front_of_their_text():
    entries = gradio_app.shown(
        [gradio_app.Said("user", "one", ("a.png", "b.png")), gradio_app.Said("assistant", "two")]
    )
    assert [entry["content"] for entry in entries] == [{"path": "a.png"}, {"path": "b.png"}, "one", "two"]


def test_long_text_is_refused():
    with pytest.raises(DataError, match="9000 characters"):
        gradio_app.question({"text": "x" * 9000, "files": []})


def test_pictures_are_limited_in_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(gradio_app, "MAX_PIXELS", 100)
    picture().save(tmp_path / "a.png")
    with pytest.raises(DataError, match="40 x 30 pixels, more than the limit of 100"):
        gradio_app.messages([gradio_app.Said("user", "x", (str(tmp_path / "a.png"),))])
