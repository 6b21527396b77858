"""Pages in a real browser: what they ask for, say on the console, and how they can be used."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (360, 768, 1280)
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def opened_browser() -> Iterator[Any]:
    """Open the system's Chromium; skip where there is none, unless REQUIRE_CHROMIUM is set."""
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        if os.environ.get("REQUIRE_CHROMIUM"):
            pytest.fail("no Chromium on the PATH")
        pytest.skip("no Chromium on the PATH (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


def check_page(path: Path, screenshots: Path | None = None) -> None:
    """Open a page as a phone, a tablet and a desktop do, light and dark, and on paper.

    Args:
        path: Of the page.
        screenshots: Folder to write a PNG of each into.

    Raises:
        AssertionError: It asks for something, says something on the console, is wider than
            the screen, or breaks a rule of axe-core.
    """
    from axe_playwright_python.sync_playwright import Axe

    said: list[str] = []
    asked: list[str] = []
    with opened_browser() as browser:
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme)
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(path.resolve().as_uri())
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": 900})
                if screenshots is not None:
                    page.screenshot(
                        path=screenshots / f"{path.stem}-{scheme}-{width}.png", full_page=True
                    )
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{path.name} is {wide} pixels wide on a screen of {width}"
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
            page.close()
    others = [url for url in asked if not url.startswith(("data:", path.resolve().as_uri()))]
    assert others == []
    assert said == []
