"""What people give as the address of a cortex."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cortex.cli.client import CallFailed, call
from tests.certificates import authority_file, pair
from tests.cortex.cli.test_cli import run
from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron


@pytest.mark.parametrize("form", ["{url}", "{url}/", "{url}/v1", "{url}/v1/", "{address}", "{address}/v1"])
async def test_address_is_understood_as_people_paste_it(start_cortex: StartCortex, benjy: V1Neuron, form: str) -> None:
    """With or without a scheme, a slash at the end, or the /v1 of an OpenAI client's base URL."""
    cortex = await start_cortex([benjy], [{"id": "m"}])
    given = form.format(url=cortex.url, address=cortex.url.removeprefix("http://"))
    fleet = await asyncio.to_thread(call, given, "GET", "/fleet", api_key=None, timeout_secs=5)
    assert "nodes" in fleet


async def test_https(
    start_cortex: StartCortex, benjy: V1Neuron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authorities are those of CORTEX_CA, or the system's. Each failure says what to set."""
    cortex = await start_cortex([benjy], [{"id": "m"}], gateway=pair(tmp_path).gateway)

    async def ask(url: str) -> str:
        try:
            return str(await asyncio.to_thread(call, url, "GET", "/fleet", api_key=None, timeout_secs=5))
        except CallFailed as error:
            return str(error)

    assert "not trusted" in (answer := await ask(cortex.url))
    assert "set CORTEX_CA" in answer
    assert "use https:// instead of http://" in await ask(cortex.url.replace("https", "http"))
    monkeypatch.setenv("CORTEX_CA", str(authority_file(tmp_path)))
    assert "benjy" in await ask(cortex.url)
    assert "TLS fails" in await ask(cortex.metrics_url.replace("http", "https"))
    monkeypatch.setenv("CORTEX_CA", str(tmp_path / "key.pem"))
    assert "CORTEX_CA: " in await ask(cortex.url)


class Failing(BaseHTTPRequestHandler):
    """Answers with the error page of a proxy."""

    def do_GET(self) -> None:
        body = b"<html><title>Bad</title><p>1 < 2 <b>servers</b> are up</html>"
        self.send_response(502)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Not to the output of the tests."""


class Redirecting(BaseHTTPRequestHandler):
    """Sends each request to `target`, or answers with the key that it got."""

    target = ""

    def do_GET(self) -> None:
        body = json.dumps({"key": self.headers.get("Authorization")}).encode()
        self.send_response(302 if self.path == "/fleet" else 200)
        if self.path == "/fleet":
            self.send_header("Location", self.target or "/elsewhere")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Not to the output of the tests."""


def redirecting(target: str = "") -> contextlib.AbstractContextManager[str]:
    return serving(type("To", (Redirecting,), {"target": target}))


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_redirect_does_not_take_the_key_to_another_server() -> None:
    """One on the same server is followed."""
    with redirecting() as near:
        found = call(near, "GET", "/fleet", api_key="secret", timeout_secs=10)
        assert found == {"key": "Bearer secret"}
    refused = pytest.raises(CallFailed, match=r"redirects to .*/stolen: if that is cortex, set --url to it")
    with redirecting() as other, redirecting(f"{other}/stolen") as near, refused:
        call(near, "GET", "/fleet", api_key="secret", timeout_secs=10)


def test_an_error_page_is_told_as_text() -> None:
    """A `<` that begins no tag stays; looking for the end of each one would take seconds for a page full of them."""
    with serving(Failing) as url, pytest.raises(CallFailed, match=r"^HTTP 502: 1 < 2 servers are up$"):
        call(url, "GET", "/fleet", api_key=None, timeout_secs=10)


async def test_the_configuration_of_something_else() -> None:
    with redirecting() as url:
        result = await run("config", "--json", "--url", url)
    assert result.status != 0
    assert "does not answer like a cortex" in result.err
