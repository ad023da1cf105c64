"""A Chromium, and the simulated fleet that its pages look at."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.cortex.accounts.sign_in.small_issuer import SmallIssuer
from tests.e2e.dev import Dev, running_dev

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

EXPECTED = ("ERR_CONNECTION_REFUSED", "status of 401", "status of 404")
"""What Chromium prints for answers that tests provoke."""

expect.set_options(timeout=60_000)  # a busy machine takes longer than the five seconds of Playwright


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Ends with these tests: while it runs, the tests of others could not run an event loop."""
    if CHROMIUM is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must run a Chromium")
        pytest.skip("no Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def dev() -> Iterator[Dev]:
    with running_dev("--fleet", "one=1xRTX4090,two=2xRTX5090") as dev:
        yield dev


@pytest.fixture
def issuer() -> Iterator[SmallIssuer]:
    """In a thread: this one cannot run an event loop besides playwright's."""
    issuer, runs, loop, end = SmallIssuer(), threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        async with issuer.running():
            runs.set()
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert runs.wait(30)
    yield issuer
    loop.call_soon_threadsafe(end.set)
    thread.join()
    loop.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of its own profile. The test fails if a script fails, the policy forbids something, or a console error is
    printed."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    assert [problem for problem in problems if not any(each in problem for each in EXPECTED)] == []
