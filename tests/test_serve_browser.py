"""The demo in a real browser. Needs Chromium and the Python package playwright; skips where they are not there."""

import shutil

import pytest
from answer_parts import make_answerer, picture

from tove_llava.serve.engine import Engine, Message

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUESTION = "What is <b>it</b>? <img src=x onerror=\"document.title='broken'\"> **really**"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(make_answerer(tmp_path_factory.mktemp("model")), name="tiny")


@pytest.fixture(scope="module")
def app(engine):
    from tove_llava.serve.gradio_app import launch

    app = launch(engine, "127.0.0.1", None, max_new_tokens=8, block=False)
    yield app
    app.close()


@pytest.fixture
def page():
    if CHROMIUM is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        yield page
        browser.close()


def visible(text):
    """The random model says control characters too, which a browser leaves out."""
    return "".join(character for character in text if character.isalnum())


def test_a_person_uploads_a_picture_asks_twice_and_reads_the_answers(app, engine, page, tmp_path):
    foreign = []
    page.on("request", lambda request: foreign.append(request.url) if "127.0.0.1" not in request.url else None)
    picture().save(tmp_path / "a.png")
    page.goto(app.local_url)
    box = page.locator("textarea")  # its placeholder goes once there is a picture
    box.wait_for(timeout=30_000)
    page.locator("input[type=file]").first.set_input_files(str(tmp_path / "a.png"))
    page.locator(".thumbnail-item, .thumbnail-image").first.wait_for(timeout=30_000)
    answers = page.locator(".bot.message")
    for number, question in enumerate([QUESTION, "And now?"], start=1):
        box.fill(question)
        box.press("Enter")
        answers.nth(number - 1).wait_for(timeout=60_000)
        page.locator(".stop-button").wait_for(state="hidden", timeout=60_000)
    page.screenshot(path=str(tmp_path / "demo.png"))

    shown = page.locator(".user.message").all_inner_texts()
    assert any(QUESTION in text for text in shown), "what was typed is shown as it was typed"
    assert page.locator(".user.message b, .user.message strong, .user.message img[src='x']").count() == 0
    assert page.title() != "broken"
    assert page.locator(".user-row img").count() == 1, "the picture is in the chat"
    first = engine.answer([Message("user", QUESTION, (picture(),))], max_new_tokens=8)
    texts = answers.all_inner_texts()
    assert len(texts) == 2 and visible(texts[0]) == visible(first) != ""
    assert not [url for url in foreign if url.startswith("http")], "the page asks nobody else for anything"
