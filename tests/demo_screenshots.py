"""Take the images of the demo that the documentation shows.

``python tests/demo_screenshots.py MODEL [FOLDER]``.
"""

import sys
from pathlib import Path

from browser import chromium
from playwright.sync_api import Page, sync_playwright

from tove_llava.inference.engine import Engine
from tove_llava.serve.gradio_app import launch

DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}


def chat(page: Page) -> None:
    """An example, a second question, and the map of one expert."""
    page.locator("#tove-chat .example").first.click()
    page.locator("#tove-chat .tove-note").first.wait_for()
    page.locator("#tove-entry .stop-button").wait_for(state="hidden")
    box = page.locator("#tove-entry textarea")
    box.fill("What color is the cylinder?")
    box.press("Enter")
    page.locator("#tove-chat .tove-note").nth(1).wait_for()
    page.locator("#tove-map img").wait_for()


def compare(page: Page) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.locator("#tove-compare-entry textarea").press("Enter")
    for side in "ab":
        page.locator(f"#tove-side-{side}").get_by_text("first token").wait_for()
        page.locator(f"#tove-side-{side} .tove-map img").wait_for()


SHOTS = {
    "demo-light": (DESKTOP, "light", chat),
    "demo-dark": (DESKTOP, "dark", chat),
    "demo-phone": (PHONE, "light", chat),
    "demo-compare": (DESKTOP, "light", compare),
}


def take(model: str, folder: Path) -> None:
    """Writes ``folder/demo-*.png``."""
    with Engine.load(model) as engine, sync_playwright() as playwright:
        app = launch(engine, "127.0.0.1", None, block=False)
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for name, (size, theme, act) in SHOTS.items():
            page = browser.new_page(viewport=size)
            page.set_default_timeout(120_000)
            page.goto(f"{app.local_url}?__theme={theme}")
            page.locator("#tove-entry textarea").wait_for()
            act(page)
            page.wait_for_timeout(1500)  # until what moves has come to rest
            page.screenshot(path=str(folder / f"{name}.png"))
            page.close()
        browser.close()
        app.close()


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[1] / "docs" / "assets")
