"""Chromium for the tests of the demo: the system's or playwright's."""

import shutil
from pathlib import Path

from tove_llava.doctor.machine import CHROMIUM


def chromium() -> str | None:
    """Return the path of a Chromium that is installed, or None."""
    system = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if system is not None:
        return system
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).is_file() else None
