"""A real browser opens a stranger's page, which attacks the services on the visitor's loopback."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.dev import Dev, running_dev

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MODEL = "Qwen/Qwen3-0.6B"

PAGE = """<!doctype html><iframe name="sink"></iframe><script>
const attacks = ATTACKS, results = [];
function form(url, body) {
  const form = document.createElement("form"), field = document.createElement("input");
  Object.assign(form, {method: "post", action: url, enctype: "text/plain", target: "sink"});
  Object.assign(field, {name: body.slice(0, -1) + ',"x":"', value: '"}'});
  form.append(field); document.body.append(form);
  const loaded = new Promise(resolve => document.querySelector("iframe").onload = resolve);
  form.submit();
  return loaded;
}
async function attack([url, body]) {
  const types = ["text/plain", "application/x-www-form-urlencoded", undefined];
  for (const type of types) {
    const data = type ? body : new Blob([body]);
    const headers = type ? {"Content-Type": type} : {};
    await fetch(url, {method: "POST", mode: "no-cors", body: data, headers});
  }
  await fetch(url, {method: "POST", mode: "no-cors", referrerPolicy: "no-referrer", body});
  navigator.sendBeacon(url, body);
  await form(url, body);
  for (const options of [{}, {method: "POST", body, headers: {"Content-Type": "application/json"}}]) {
    results.push(await fetch(url, options).then(() => "read", () => "failed"));
  }
}
(async () => {
  for (const each of attacks) await attack(each);
  await fetch("/done", {method: "POST", body: JSON.stringify(results)});
})();
</script>"""


@pytest.fixture
def chromium(tmp_path: Path) -> list[str]:
    """Chromium's command line, with its own profile."""
    if CHROMIUM is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must run a Chromium")
        pytest.skip("no Chromium")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    return [CHROMIUM, *flags, f"--user-data-dir={tmp_path}", "--host-resolver-rules=MAP evil.example 127.0.0.1"]


@pytest.fixture(scope="module")
def dev() -> Iterator[Dev]:
    with running_dev("--fleet", "one=1xRTX4090") as dev:
        yield dev


def neuron_of(dev: Dev) -> str:
    found = re.search(r"one at (http://127\.0\.0\.1:\d+)", dev.text())
    assert found is not None
    return found[1]


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


class Stranger(http.server.ThreadingHTTPServer):
    """The page's own site; `done` is set when the page has finished its attacks."""

    def __init__(self, page: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.page = page.encode()
        self.results: list[str] = []
        self.done = threading.Event()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Stranger

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.page)

    def do_POST(self) -> None:
        self.server.results = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@pytest.mark.browser
def test_a_strangers_page_loads_no_model(chromium: list[str], dev: Dev) -> None:
    """fetch, sendBeacon and forms, with every media type that needs no preflight, and JSON with one."""
    neuron = neuron_of(dev)
    attacks = [
        (f"{neuron}/models/load", json.dumps({"model_id": MODEL, "harness": "sim"})),
        (f"{dev.url}/fleet/load", json.dumps({"model": MODEL})),
        (f"{dev.url}/v1/completions", json.dumps({"model": MODEL, "prompt": "hi"})),
        (f"{dev.url}/fleet/nodes/one/drain", ""),
    ]
    with Stranger(PAGE.replace("ATTACKS", json.dumps(attacks))) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        url = f"http://evil.example:{stranger.server_address[1]}/"
        with subprocess.Popen([*chromium, "--remote-debugging-port=0", url], stderr=subprocess.DEVNULL) as browser:
            try:
                assert stranger.done.wait(40)
            finally:
                browser.terminate()
                stranger.shutdown()
    assert set(stranger.results) == {"failed"}
    fleet = get(f"{dev.url}/fleet")
    assert (get(f"{neuron}/models"), fleet["loads"], fleet["nodes"][0]["draining"]) == ([], [], False)


@pytest.mark.browser
def test_a_rebound_name_shows_nothing(chromium: list[str], dev: Dev) -> None:
    """The page's name resolves to loopback: same-origin for the browser, refused by the services."""
    for url, path in ((neuron_of(dev), "/models"), (dev.url, "/v1/models")):
        rebound = url.replace("127.0.0.1", "evil.example") + path
        shown = subprocess.run(
            [*chromium, "--dump-dom", rebound], capture_output=True, text=True, timeout=50, check=True
        )
        assert "allowed_hosts" in shown.stdout
        assert MODEL not in shown.stdout
