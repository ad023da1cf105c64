"""Web pages of allowed origins can send inference requests and read the answers (CORS)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, answering, plain, stream_head
from tests.cortex.raw_http import Answer, Head, RawClient, chunked, connected, request

MODEL = "org/small"
PAGE = "https://chat.example.com"
ORIGIN = f"Origin: {PAGE}"
BODY = json.dumps({"model": MODEL}).encode()


@pytest.fixture
async def engine() -> AsyncIterator[RawEngine]:
    async with RawEngine().running() as engine:
        yield engine


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> RunningCortex:
    """A cortex that the page may use."""
    benjy.models[MODEL] = "loaded"
    benjy.engine_url = engine.url
    return await start_cortex(
        [benjy], [{"id": MODEL}], gateway={"allowed_origins": [PAGE, "http://localhost:3000"], "max_body_mib": 1}
    )


@pytest.fixture
async def client(cortex: RunningCortex) -> AsyncIterator[RawClient]:
    async with connected(cortex.url) as client:
        yield client


def readable(head: Head, origin: str = PAGE) -> bool:
    """The page may read the answer and the headers that cortex adds."""
    exposed = {name.strip() for name in (head.get("access-control-expose-headers") or "").split(",")}
    assert (head.get("access-control-allow-origin") is None) is (exposed == {""})
    wanted = {"x-request-id", "x-cortex-node", "x-cortex-cold-start"}
    return head.get("access-control-allow-origin") == origin and exposed >= wanted


def preflight(target: str, method: str = "POST", origin: str = ORIGIN, *lines: str) -> bytes:
    asked = (
        f"Access-Control-Request-Method: {method}",
        "Access-Control-Request-Headers: authorization, x-stainless-os",
    )
    return request(b"", origin, *asked, *lines, method="OPTIONS", target=target)


@pytest.mark.parametrize(
    ("target", "method"),
    [
        ("/v1/chat/completions", "POST"),
        ("/v1/messages", "POST"),
        ("/v2/rerank", "POST"),
        ("/chat/completions", "POST"),
        ("/v1/models", "GET"),
        ("/v1/models/org/small", "GET"),
    ],
)
async def test_preflight_is_answered(client: RawClient, engine: RawEngine, target: str, method: str) -> None:
    """The answer allows the method and headers that the page asks for and has no body; neither engine nor neuron gets
    the request."""
    answer = await client.ask(preflight(target, method), "OPTIONS")
    assert (answer.status, answer.framing) == (204, "none")
    assert readable(answer)
    assert method in (answer.get("access-control-allow-methods") or "")
    assert answer.get("access-control-allow-headers") == "authorization, x-stainless-os"
    assert int(answer.get("access-control-max-age") or "0") > 0
    assert answer.get("x-request-id") is not None
    assert engine.requests == []
    assert (await client.ask(request(BODY, ORIGIN))).status == 200


async def test_preflight_of_a_private_network(client: RawClient) -> None:
    """A public page that uses a cortex at home asks for this too."""
    private = "Access-Control-Request-Private-Network: true"
    answer = await client.ask(preflight("/v1/models", "GET", ORIGIN, private), "OPTIONS")
    assert answer.get("access-control-allow-private-network") == "true"


@pytest.mark.parametrize("target", ["/fleet/load", "/fleet", "/health", "/openapi.json"])
async def test_fleet_is_not_for_pages(client: RawClient, target: str) -> None:
    """Neither a preflight nor an answer lets a page use what is for operators."""
    answer = await client.ask(preflight(target), "OPTIONS")
    assert answer.status == 405
    assert not readable(answer)
    assert not readable(await client.ask(request(b"", ORIGIN, method="GET", target=target), "GET"))


async def test_answers_can_be_read(client: RawClient, engine: RawEngine) -> None:
    """The engine's, plain and streamed, cortex's list, and errors of every kind."""
    engine.scripts += [answering(plain(b"{}")), answering(stream_head() + chunked(b"data: [DONE]\n\n", 9))]
    asked = [
        (request(BODY, ORIGIN), 200),
        (request(BODY, ORIGIN), 200),
        (request(b"", ORIGIN, method="GET", target="/v1/models"), 200),
        (request(b"", ORIGIN, method="GET", target="/v1/models/unknown"), 404),
        (request(b'{"model":"unknown"}', ORIGIN), 404),
        (request(b"no", ORIGIN), 400),
        (request(b"{}", ORIGIN, target="/v2/rerank"), 404),
        (request(b"", ORIGIN, "Content-Length: 9999999", length=False), 413),
    ]
    for data, status in asked:
        answer: Answer = await client.ask(data)
        assert answer.status == status
        assert readable(answer)
        assert answer.get("vary") == "Origin"


async def test_each_origin_gets_its_own_name(client: RawClient) -> None:
    """Case does not matter in the configuration; the browser compares with what it sent."""
    answer = await client.ask(request(BODY, "Origin: http://LOCALHOST:3000"))
    assert readable(answer, "http://LOCALHOST:3000")


async def test_the_engine_does_not_get_the_origin(client: RawClient, engine: RawEngine) -> None:
    """vLLM would answer with `access-control-allow-origin: *` of its own."""
    await client.ask(request(BODY, ORIGIN))
    assert engine.requests[0].all("origin") == []


async def test_waiting_stream_can_be_read(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """cortex adds the CORS headers to the head that it sends before the engine's."""
    benjy.load_gate.clear()
    cortex = await start_cortex(
        [benjy], [{"id": MODEL}], gateway={"allowed_origins": [PAGE]}, waiting={"first_comment_secs": 0.01}
    )
    async with connected(cortex.url) as client:
        await client.send(request(b'{"model":"org/small","stream":true}', ORIGIN))
        assert readable(await client.head())


async def test_all_origins(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """`"*"` allows every page, and the answer says so."""
    benjy.models[MODEL] = "loaded"
    cortex = await start_cortex([benjy], [{"id": MODEL}], gateway={"allowed_origins": ["*"]})
    async with connected(cortex.url) as client:
        assert readable(await client.ask(request(b"", ORIGIN, method="GET", target="/v1/models")), "*")
        assert readable(await client.ask(preflight("/v1/messages"), "OPTIONS"), "*")


async def test_without_an_origin_nothing_is_added(client: RawClient) -> None:
    """Clients outside a browser see no CORS headers."""
    answer = await client.ask(request(BODY))
    assert answer.status == 200
    assert not any(name.startswith("access-control") or name == "vary" for name, _ in answer.headers)
    answer = await client.ask(request(b"", method="OPTIONS"), "OPTIONS")
    assert (answer.status, answer.get("allow")) == (405, "POST")
