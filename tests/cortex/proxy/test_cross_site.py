"""A web page must not use a cortex through its visitor's browser, unless its origin is allowed."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import pytest

from cortex.http.heads import request_reader
from cortex.http.request import Request
from cortex.proxy.cross_site import CrossSiteCheck
from shared.cross_site import CrossSitePolicy
from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import Answer, connected, request

MODEL = "org/small"
BODY = json.dumps({"model": MODEL}).encode()
GETS = ("/v1/models", f"/v1/models/{MODEL}", "/health", "/fleet", "/fleet/events", "/fleet/explain?model=m", "/nope")
POSTS = (
    "/v1/chat/completions",
    "/v1/messages",
    "/tokenize",
    "/fleet/load",
    "/fleet/unload",
    "/fleet/nodes/benjy/drain",
    "/fleet/nodes/benjy/resume",
)


async def ask(
    url: str, target: str, *lines: str, method: str = "GET", body: bytes = b"", host: str | None = "127.0.0.1"
) -> Answer:
    async with connected(url) as client:
        return await client.ask(request(body, *lines, method=method, target=target, host=host), method)


def refused(answer: Answer, key: str) -> bool:
    """403 `forbidden`, in either error shape, with the key that allows it."""
    error = json.loads(answer.body)["error"]
    return (answer.status, error["code"]) == (403, "forbidden") and f"[gateway] {key}" in error["message"]


@pytest.mark.parametrize(
    ("lines", "host", "key"),
    [
        (["Origin: http://evil.example"], "127.0.0.1", "allowed_origins"),
        (["Origin: null"], "127.0.0.1", "allowed_origins"),
        (["Origin: http://127.0.0.1:1"], "127.0.0.1:2", "allowed_origins"),
        (["Sec-Fetch-Site: cross-site"], "127.0.0.1", "allowed_origins"),
        ([], "evil.example", "allowed_hosts"),
        (["Origin: http://evil.example", "Sec-Fetch-Site: same-origin"], "evil.example", "allowed_hosts"),
    ],
)
async def test_requests_of_web_pages_are_refused(
    start_cortex: StartCortex, benjy: V1Neuron, lines: list[str], host: str, key: str
) -> None:
    """Every route refuses them, known or not, and no engine or neuron gets the request. The connection stays usable."""
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    async with connected(cortex.url) as client:
        for target in GETS:
            assert refused(await client.ask(request(b"", *lines, method="GET", target=target, host=host)), key), target
        for target in POSTS:
            for kind in ("application/json", "text/plain"):
                typed = [*lines, f"Content-Type: {kind}"]
                assert refused(await client.ask(request(BODY, *typed, target=target, host=host)), key), target
        preflight = request(b"", *lines, method="OPTIONS", target="/v1/chat/completions", host=host)
        assert refused(await client.ask(preflight), key)
        assert (await client.ask(request(b"", method="GET", target="/health"))).status == 200
    assert refused(await ask(cortex.metrics_url, "/metrics", *lines, host=host), key)
    assert (benjy.loads, benjy.unloads, cortex.parts.fleet.snapshot().nodes["benjy"].draining) == ([], [], False)


async def test_own_and_allowed_origins_are_served(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The dashboard's own requests, an allowed chat page, and names that clients use."""
    settings = {"allowed_origins": ["https://chat.example"], "allowed_hosts": ["ai.example.com"]}
    benjy.models[MODEL] = "loaded"
    cortex = await start_cortex([benjy], [{"id": MODEL}], gateway=settings)
    own = urlsplit(cortex.url).netloc
    for lines, host in (
        (["Origin: https://chat.example", "Sec-Fetch-Site: cross-site"], own),
        ([f"Origin: {cortex.url}", "Sec-Fetch-Site: same-origin"], own),
        (["Origin: https://ai.example.com"], "ai.example.com"),
        (["Sec-Fetch-Site: none"], "cortex"),
        ([], "cortex.internal:31313"),
        ([], "localhost"),
        ([], "[::1]:31313"),
    ):
        for _ in range(2):  # the second from memory
            assert (await ask(cortex.url, "/v1/models", *lines, host=host)).status == 200
            typed = [*lines, "Content-Type: application/json"]
            answer = await ask(cortex.url, "/v1/completions", *typed, method="POST", body=BODY, host=host)
            assert answer.status == 200
    old = request(b"", method="GET", target="/v1/models", version="HTTP/1.0", host=None)
    async with connected(cortex.url) as client:
        assert (await client.ask(old)).status == 200


async def test_engines_do_not_get_origins(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """vLLM answers every origin with `access-control-allow-origin: *`; which ones may read is cortex's decision."""
    benjy.models[MODEL] = "loaded"
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    lines = [f"Origin: {cortex.url}", "Sec-Fetch-Site: same-origin", "Content-Type: application/json"]
    own = urlsplit(cortex.url).netloc
    assert (await ask(cortex.url, "/v1/completions", *lines, method="POST", body=BODY, host=own)).status == 200
    sent = {name.lower() for name in benjy.engine.requests[-1][1]}
    assert sent.isdisjoint({"origin", "sec-fetch-site"})


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
async def test_operator_actions_must_be_json(start_cortex: StartCortex, benjy: V1Neuron, kind: str) -> None:
    """Other media types, which a page can send without a preflight, are refused."""
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    for target in ("/fleet/load", "/fleet/unload", "/fleet/nodes/benjy/drain"):
        answer = await ask(cortex.url, target, f"Content-Type: {kind}", method="POST", body=BODY)
        assert answer.status == 415, target
        assert "application/json" in json.loads(answer.body)["error"]["message"]
    assert (benjy.loads, cortex.parts.fleet.snapshot().nodes["benjy"].draining) == ([], False)
    drained = await ask(cortex.url, "/fleet/nodes/benjy/drain", method="POST")  # curl -X POST
    assert (drained.status, cortex.parts.fleet.snapshot().nodes["benjy"].draining) == (200, True)


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
async def test_the_engine_decides_about_media_types(
    start_cortex: StartCortex, benjy: V1Neuron, kind: str | None
) -> None:
    """`curl -d` without a header sends a form type. Some engines take it, vLLM answers 400; cortex passes it on."""
    benjy.models[MODEL] = "loaded"
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    lines = [] if kind is None else [f"Content-Type: {kind}"]
    assert (await ask(cortex.url, "/v1/completions", *lines, method="POST", body=BODY)).status == 200
    headers = {name.lower(): value for name, value in benjy.engine.requests[-1][1].items()}
    assert headers.get("content-type") == kind


async def test_refused_requests_are_counted(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """An operator sees in the metrics that pages are refused."""
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    await ask(cortex.url, "/v1/completions", "Origin: http://evil.example", method="POST", body=BODY)
    page = (await ask(cortex.metrics_url, "/metrics")).body.decode()
    assert 'cortex_request_errors_total{code="forbidden"' in page


def test_memory_of_accepted_senders_is_bounded() -> None:
    """Clients choose the headers: they must not fill cortex's memory with them."""
    check = CrossSiteCheck(CrossSitePolicy("origins", "hosts"))
    for number in range(5000):
        head, reader = request_reader()
        reader.feed(request(b"", method="GET", host=f"name-{number}" + "x" * (number % 2 * 9000)))
        assert check.refusal(Request(head, peer="", received=0)) is None
    remembered = sum(len(value) for headers in check._accepted for value in headers if value is not None)
    assert remembered < 300_000
