"""The demo in a real browser.

It needs Chromium (scripts/browser.sh) and the Python package playwright, and skips without them.
"""

import threading

import pytest
from answer_parts import before_forward, picture
from browser import chromium

from tove_llava.inference.engine import Engine, Message

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
pytestmark = pytest.mark.slow

QUESTION = "What is <b>it</b>? <img src=x onerror=\"document.title='broken'\"> **really**"
TOKENS = 12
WAIT = 60_000  # milliseconds; machines may be busy
INK = "getComputedStyle(document.querySelector('#tove-head h1')).color"


@pytest.fixture(scope="module")
def engine(answerer):
    with Engine(answerer, name="tiny") as engine:
        yield engine


@pytest.fixture(scope="module")
def app(engine, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # a server that ends takes files along that another shows too
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        yield from serve(engine)


def serve(engine):
    from tove_llava.serve.gradio_app import launch

    app = launch(engine, "127.0.0.1", None, max_new_tokens=400, block=False)
    yield app
    app.close()


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    if path is None:
        pytest.skip("no Chromium is installed (scripts/browser.sh, or apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def view():
    """Size of the window; a test may have another."""
    return {"width": 1280, "height": 900}


@pytest.fixture
def page(browser, app, view):
    """Open the page; expect no console error and no foreign request."""
    page = browser.new_page(viewport=view)
    page.set_default_timeout(WAIT)
    faults, foreign = [], []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("response", lambda got: faults.append(f"{got.status} {got.url}") if got.status >= 400 else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: foreign.append(request.url))
    page.goto(app.local_url)
    box(page).wait_for()
    set_tokens(page, TOKENS)
    yield page
    page.close()
    assert not faults
    # Attempts of the browser itself (chrome://) are not the page's.
    assert not [url for url in foreign if url.startswith("http") and not url.startswith("http://127.0.0.1:")]


@pytest.fixture
def slow(answerer, monkeypatch):
    """A model that takes its time until the event is set."""
    hurry = threading.Event()
    before_forward(answerer, monkeypatch, lambda ids: hurry.wait(0.1))
    yield hurry
    hurry.set()


def box(page):
    return page.locator("#tove-entry textarea")


def notes(page, where="#tove-chat"):
    return page.locator(f"{where} .tove-note")


def answers(page, where="#tove-chat"):
    return page.locator(f"{where} .bot.message")


def text(page, number=0):
    """Return an answer's letters and digits, without the line of times."""
    whole, note = answers(page).nth(number).inner_text(), notes(page).nth(number).inner_text()
    assert note in whole
    return visible(whole.replace(note, ""))


def set_tokens(page, number):
    page.locator("#tove-settings button").first.click()
    field, slider = (page.locator(f"#tove-longest input[type={kind}]") for kind in ("number", "range"))
    for _ in range(30):  # right after loading, the page does not listen yet
        field.fill(str(number))
        field.press("Tab")
        page.wait_for_timeout(200)
        if slider.input_value() == str(number):
            break
    assert slider.input_value() == str(number)
    page.locator("#tove-settings button").first.click()


def attach(page, file, where="#tove-entry"):
    page.locator(f"{where} input[type=file]").first.set_input_files(str(file))
    page.locator(f"{where} .thumbnail-item, {where} .thumbnail-image").first.wait_for()


def ask(page, text, number):
    """Ask the question and wait until times show the answer's end."""
    box(page).fill(text)
    box(page).press("Enter")
    finished(page, number)


def finished(page, number):
    notes(page).nth(number - 1).wait_for()
    page.locator("#tove-entry .stop-button").wait_for(state="hidden")


def save(folder, index=0):
    file = folder / f"{index}.png"
    picture(index, (120, 90)).save(file)
    return file


def visible(text):
    """Drop the random model's control characters, which a browser leaves out."""
    return "".join(character for character in text if character.isalnum())


def said(engine, text, *images, **options):
    return visible(engine.answer([Message("user", text, images)], max_new_tokens=TOKENS, **options))


def source(page, where="#tove-map"):
    """Return the drawing's address, which is another for each drawing."""
    image = page.locator(f"{where} img").first
    image.wait_for()
    return image.get_attribute("src")


def changed(page, before, where="#tove-map"):
    page.wait_for_function(
        "([where, before]) => { const img = document.querySelector(where + ' img'); return img && img.src !== before }",
        arg=[where, before],
    )
    return source(page, where)


def test_a_person_uploads_an_image_asks_twice_and_reads_the_answers(engine, page, tmp_path):
    attach(page, save(tmp_path))
    ask(page, QUESTION, 1)
    ask(page, "And now?", 2)
    shown = page.locator("#tove-chat .user.message").all_inner_texts()
    assert any(QUESTION in text for text in shown), "what was typed is shown as it was typed"
    assert page.locator(".user.message b, .user.message strong, .user.message img[src='x']").count() == 0
    assert page.title() == "ToVE-LLaVA"
    assert page.locator("#tove-chat .user-row img").count() == 1, "the image is in the chat"
    assert text(page) == said(engine, QUESTION, picture(0, (120, 90))) != ""
    assert "tower" in notes(page).first.inner_text() and "first token" in notes(page).nth(1).inner_text()
    assert source(page) and page.locator("#tove-legend .tove-row").count() == 3


def test_an_answer_streams_in_and_can_be_stopped(engine, page, slow):
    set_tokens(page, 400)
    box(page).fill("Talk")
    box(page).press("Enter")
    answers(page).first.wait_for()
    first = answers(page).first.inner_text()
    page.wait_for_function(
        "before => document.querySelector('#tove-chat .bot.message').innerText.length > before", arg=len(first)
    )
    page.locator("#tove-entry .stop-button").click()
    page.get_by_text("stopped", exact=True).wait_for()
    page.wait_for_timeout(500)
    kept = answers(page).first.inner_text()
    page.wait_for_timeout(1000)
    assert answers(page).first.inner_text() == kept and engine.worker.running == 0, "the row is free, the text stays"
    slow.set()
    set_tokens(page, TOKENS)
    ask(page, "And?", 2)


def test_a_detached_expert_changes_answer_map_and_legend(engine, page, tmp_path):
    attach(page, save(tmp_path))
    ask(page, "What is it?", 1)
    before = source(page)
    page.locator("#tove-attached").get_by_label("normal").uncheck()
    changed(page, before)
    page.locator("#tove-legend .tove-off").get_by_text("detached").wait_for()
    page.locator("#tove-again").click()
    page.locator("#tove-chat").get_by_text("2 experts").wait_for()
    finished(page, 1)
    image = picture(0, (120, 90))
    without = said(engine, "What is it?", image, experts=("depth", "edge"))
    assert text(page) == without != said(engine, "What is it?", image)


def test_views_and_opacity_redraw_without_the_model(answerer, page, tmp_path, monkeypatch):
    attach(page, save(tmp_path))
    ask(page, "What is it?", 1)
    before = source(page)

    def fail(*args, **kwargs):
        raise AssertionError("the tower runs")

    monkeypatch.setattr(answerer.tower, "forward", fail)
    page.locator("#tove-view").get_by_label("edge").check()
    after = changed(page, before)
    assert "weight of edge" in page.locator("#tove-legend").inner_text()
    page.locator("#tove-opacity input[type=number]").fill("1")
    page.locator("#tove-opacity input[type=number]").press("Tab")
    changed(page, after)


def test_the_image_of_the_map_can_be_chosen(page, tmp_path):
    attach(page, save(tmp_path))
    page.locator("#tove-entry input[type=file]").first.set_input_files(str(save(tmp_path, 1)))
    page.wait_for_function("document.querySelectorAll('#tove-entry img').length === 2")
    ask(page, "Which is redder?", 1)
    before = source(page)
    assert page.locator("#tove-picture input").count() == 2 and page.locator("#tove-picture input").nth(1).is_checked()
    page.locator("#tove-picture input").first.check()
    changed(page, before)


def test_the_last_question_can_be_edited_and_asked_again(engine, page, tmp_path):
    attach(page, save(tmp_path))
    ask(page, "What is 1 < 2?", 1)
    page.locator("#tove-edit").click()
    page.wait_for_function("document.querySelector('#tove-entry textarea').value !== ''")
    assert box(page).input_value() == "What is 1 < 2?" and answers(page).count() == 0
    assert page.locator("#tove-entry img").count() == 1
    ask(page, "What is it?", 1)
    assert text(page) == said(engine, "What is it?", picture(0, (120, 90)))
    page.locator("#tove-new").click()
    page.locator("#tove-chat .example").first.wait_for()
    assert answers(page).count() == 0


def test_an_example_runs_at_a_click(page):
    page.locator("#tove-chat .example").nth(1).click()
    finished(page, 1)
    assert answers(page).first.inner_text() and source(page)


def test_two_sides_answer_the_same_question(engine, page, tmp_path):
    page.get_by_role("tab", name="Compare").click()
    entry = "#tove-compare-entry"
    attach(page, save(tmp_path), entry)
    page.locator(f"{entry} textarea").fill("What is it?")
    page.locator("#tove-side-b").get_by_label("edge").check()
    page.locator(f"{entry} textarea").press("Enter")
    for side in ("#tove-side-a", "#tove-side-b"):
        page.locator(side).get_by_text("first token").wait_for()
    replies = [page.locator(f"#tove-side-{letter} .bot.message").first.inner_text() for letter in "ab"]
    assert replies[0].split()[0] != replies[1].split()[0] and "3 experts" in replies[0] and "1 expert" in replies[1]
    assert source(page, "#tove-side-a") != source(page, "#tove-side-b")


def test_a_refused_file_stays_in_the_box_with_a_message(page, tmp_path):
    (tmp_path / "page.jpg").write_bytes(b"<html><script>document.title='broken'</script></html>")
    page.locator("#tove-entry input[type=file]").first.set_input_files(str(tmp_path / "page.jpg"))
    page.wait_for_timeout(1000)
    box(page).fill("What?")
    box(page).press("Enter")
    page.get_by_text("page.jpg is not an image").wait_for()
    page.locator("#tove-entry .stop-button").wait_for(state="hidden")
    assert box(page).input_value() == "What?" and page.title() == "ToVE-LLaVA"
    box(page).fill("x" * 10_000)
    box(page).press("Enter")
    page.get_by_text("10000 characters; at most 8000").wait_for()
    assert len(box(page).input_value()) == 10_000, "it can be shortened"


def test_light_and_dark(page, browser, app):
    light = page.evaluate(INK)
    page.locator("#tove-theme").click()
    page.wait_for_function(f"before => {INK} !== before", arg=light)
    other = browser.new_page()
    other.goto(f"{app.local_url}?__theme=dark")
    other.locator("#tove-entry textarea").wait_for(timeout=WAIT)
    assert other.evaluate(INK) == page.evaluate(INK)
    other.close()


@pytest.mark.parametrize("view", [{"width": 390, "height": 844}])
def test_a_phone_needs_no_sideways_scrolling(page, tmp_path, view):
    attach(page, save(tmp_path))
    ask(page, "What is it?", 1)
    source(page)
    for tab in ("Chat", "Compare"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("tab", name="Chat").click()
    for name in ("#tove-entry", "#tove-map", "#tove-attached", "#tove-again"):
        area = page.locator(name).bounding_box()
        assert area["x"] >= 0 and area["x"] + area["width"] <= 390


def test_the_keyboard_is_enough(engine, page):
    """Reach an example, a toggle and the question with the keyboard."""

    def reach(selector):
        for _ in range(60):
            if page.evaluate("selector => document.activeElement?.matches(selector)", selector):
                return
            page.keyboard.press("Tab")
        pytest.fail(f"Tab does not reach {selector}")

    page.evaluate("document.activeElement?.blur()")
    reach("#tove-chat .example")
    page.keyboard.press("Enter")
    finished(page, 1)
    before = source(page)
    reach("#tove-attached input")
    page.keyboard.press("Space")
    changed(page, before)
    box(page).focus()
    page.keyboard.type("And now?")
    page.keyboard.press("Enter")
    finished(page, 2)
