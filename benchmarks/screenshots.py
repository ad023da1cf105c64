"""`python -m benchmarks.screenshots`: the pictures of docs/dashboard.md, of a simulated fleet that three callers use.

It runs `cortex dev`, has requests sent for some minutes, so that the timeline and the usage show something, and writes
docs/dashboard-PAGE.png with Chromium while they go on. Figures and times differ from run to run.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from benchmarks.scale.services import Child

_HOST = "127.0.0.1"
_CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
_DOCS = Path(__file__).parents[1] / "docs"
_WIDTH, _HEIGHT = 1200, 860
_SMALL, _MIDDLE, _LARGE = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "Qwen/Qwen3.6-27B"
_CALLERS = {
    "alice": (_MIDDLE, _LARGE, _MIDDLE, _SMALL),
    "nightly-batch": (_SMALL, _SMALL, _MIDDLE),
    "support-bot": (_LARGE, _LARGE, _LARGE, "gpt-4"),
}
"""What each key asks for, in turn; the catalogue has no gpt-4."""
_UNLOAD_SECS = 100
"""How often an operator unloads a model, for half as long; after 8 minutes all three are loaded."""


def port_of(dev: Child) -> int:
    """Of the cortex that `cortex dev` has started; waits until the fleet is complete."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        dev.check()
        output = dev.log.read_text(encoding="utf-8")
        found = re.search(rf"cortex is at http://{_HOST}:(\d+)", output)
        if found is not None and "Ctrl-C stops" in output:
            return int(found[1])
        time.sleep(0.2)
    raise TimeoutError(f"cortex dev is not ready after 120 s:\n{dev.last_lines()}")


def asked(port: int, path: str, body: dict[str, Any], key: str | None = None) -> Any:
    """The JSON answer to a POST."""
    headers = {"Content-Type": "application/json", **({} if key is None else {"Authorization": f"Bearer {key}"})}
    connection = http.client.HTTPConnection(_HOST, port, timeout=120)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), headers)
        return json.loads(connection.getresponse().read())


@contextlib.contextmanager
def traffic(port: int) -> Iterator[None]:
    """Requests of every caller, until the end of the block."""
    ended = threading.Event()

    def call(key: str, models: tuple[str, ...]) -> None:
        turn = 0
        while not ended.is_set():
            chat = {"role": "user", "content": "Explain in a few sentences how a heat pump works."}
            body = {"model": models[turn % len(models)], "messages": [chat], "max_tokens": 40 + 30 * (turn % 5)}
            asked(port, "/v1/chat/completions", body, key)
            turn += 1
            ended.wait(1 + turn % 4)

    secrets = {name: str(asked(port, "/keys", {"name": name})["key"]) for name in _CALLERS}

    def unload() -> None:
        for model in itertools.cycle((_SMALL, _LARGE, _MIDDLE)):
            if ended.wait(_UNLOAD_SECS):
                return
            asked(port, "/fleet/unload", {"model": model, "for_secs": _UNLOAD_SECS / 2})

    threads = [threading.Thread(target=call, args=(secrets[name], models)) for name, models in _CALLERS.items()]
    threads.append(threading.Thread(target=unload))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def requests_page(page: Page) -> None:
    """The steps of a cold start, opened."""
    row = page.get_by_role("list", name="Ended requests").get_by_role("button", name=re.compile("200.*27B.*cold start"))
    row.first.click()
    page.get_by_role("list", name="Where its time went").wait_for()


def timeline_page(page: Page) -> None:
    page.get_by_role("button", name="15 min").click()
    page.get_by_role("img", name=re.compile("Requests in each minute")).wait_for()


def usage_page(page: Page) -> None:
    page.get_by_role("rowheader", name=_LARGE).first.wait_for()


def playground_page(page: Page) -> None:
    page.get_by_role("combobox", name="Model").select_option(_LARGE)
    page.get_by_label("Message").fill("What is a KV cache?")
    page.get_by_role("button", name="Send").click()
    page.get_by_text(re.compile("first token after")).wait_for()


def configuration_page(page: Page) -> None:
    page.get_by_role("button", name="Read the files again").wait_for()


def nothing(page: Page) -> None:
    """The page shows all as it opens."""


_PAGES: dict[str, tuple[str, Callable[[Page], None]]] = {
    "fleet": ("light", nothing),
    "models": ("light", nothing),
    "requests": ("light", requests_page),
    "timeline": ("dark", timeline_page),
    "usage": ("light", usage_page),
    "playground": ("light", playground_page),
    "configuration": ("light", configuration_page),
}
"""Each page with its theme, and what is done before its picture is taken."""


def take(page: Page, port: int, name: str, directory: Path) -> None:
    theme, prepare = _PAGES[name]
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    page.goto(f"http://{_HOST}:{port}/#/{name}")
    page.get_by_role("heading", level=1, name=name.capitalize()).wait_for()
    prepare(page)
    bottom = page.locator("main > :last-child").evaluate("each => each.getBoundingClientRect().bottom")
    height = min(_HEIGHT, bottom + 16)  # without what is empty below
    page.screenshot(path=directory / f"dashboard-{name}.png", clip={"x": 0, "y": 0, "width": _WIDTH, "height": height})


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.screenshots", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--minutes", type=float, default=8.0, help="how long requests come before (default 8)")
    parser.add_argument("--output", type=Path, default=_DOCS, help="default: docs")
    parser.add_argument("--pages", nargs="+", choices=_PAGES, default=list(_PAGES), help="default: all")
    given = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium: install Debian's package chromium")
    with tempfile.TemporaryDirectory(prefix="screenshots-") as scratch:
        command = [sys.executable, "-m", "cortex", "dev", "--port", "0"]
        with Child(command, Path(scratch) / "dev.log") as dev:
            port = port_of(dev)
            with traffic(port), sync_playwright() as playwright:
                time.sleep(given.minutes * 60)
                browser = playwright.chromium.launch(executable_path=chromium, args=list(_CHROMIUM))
                page = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
                page.set_default_timeout(60_000)
                for name in given.pages:
                    if name == "requests":  # so that a cold start is among the last
                        asked(port, "/fleet/unload", {"model": _LARGE})
                    take(page, port, name, given.output)
                browser.close()


if __name__ == "__main__":
    main()
