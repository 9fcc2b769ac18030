"""The machine's own Chromium, driven through playwright: fixtures, for `pytest_plugins = ["tests.browser"]`.

Where playwright or the browser is absent the tests that look at pages are skipped; with FLOWRL_REQUIRE_BROWSER=1 they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def no_browser(reason: str) -> NoReturn:
    """Skip, or fail where a browser is required."""
    if os.environ.get("FLOWRL_REQUIRE_BROWSER") == "1":
        pytest.fail(f"FLOWRL_REQUIRE_BROWSER=1, but {reason}.")
    pytest.skip(f"Pages were not looked at in a browser: {reason}.")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The machine's own Chromium."""
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        no_browser("playwright is not installed")
    if not Path(chromium).exists():
        no_browser(f"there is no {chromium}")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="session")
def problems() -> list[str]:
    """What went wrong in any page: errors on the console, exceptions, requests that leave the disk."""
    return []


def new_page(browser: Any, problems: list[str], **options: Any) -> Any:
    """A page in a fresh context, which writes down what goes wrong in it."""

    def console(message: Any) -> None:
        if message.type == "error":
            problems.append(message.text)

    def request(asked: Any) -> None:
        if not asked.url.startswith(("file:", "data:", "about:", "blob:")):
            problems.append(asked.url)

    page = browser.new_context(**{"viewport": {"width": 1300, "height": 900}} | options).new_page()
    page.set_default_timeout(30_000)
    page.on("console", console)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", request)
    return page


@pytest.fixture(scope="session")
def tab(browser: Any, problems: list[str]) -> Any:
    """The page that most tests share, one after the other."""
    return new_page(browser, problems)


@pytest.fixture
def show(browser: Any, tab: Any, problems: list[str]) -> Iterator[Any]:
    """show(path, hash, **options) opens a gallery, in a page of its own where it has options; then: no problems.

    `expected` is an error message that a test provokes.
    """
    tab.goto("about:blank")  # what the page before it still had to say (an image that was missing) is not this test's
    problems.clear()
    pages, provoked = [], []

    def open_page(path: Path, hash_: str = "", expected: str | None = None, **options: Any) -> Any:
        if expected:
            provoked.append(expected)
        page = tab
        if options:
            page = new_page(browser, problems, **options)
            pages.append(page)
        page.goto("about:blank")
        page.goto(path.as_uri() + hash_)
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert [text for text in problems if not any(message in text for message in provoked)] == []
