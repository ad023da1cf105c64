"""Oversized parts of requests: refused in the error envelope, and never repeated at length."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine
from tests.cortex.raw_http import connected, request, until
from tests.far_host import FarHost, far_host

MODEL = "org/small"
LONG = "a" * 60_000


@pytest.fixture
def far() -> Iterator[FarHost]:
    """A host behind a cable with segments of Ethernet's size."""
    with far_host(mtu=1500) as host:
        yield host


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/messages"])
async def test_huge_model_name_is_not_echoed(
    start_cortex: StartCortex,
    benjy: V1Neuron,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    target: str,
) -> None:
    """The answer, the logs and the metrics contain only its beginning."""
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    caplog.set_level(logging.DEBUG)
    async with connected(cortex.url) as client:
        answer = await client.ask(request(json.dumps({"model": "x" * 1_000_000}).encode(), target=target))
    assert answer.status == 404
    assert "the model 'xxx" in json.loads(answer.body)["error"]["message"]
    assert len(answer.body) < 1000
    async with cortex.http.get(f"{cortex.metrics_url}/metrics") as page:
        assert "x" * 1000 not in await page.text()
    assert sum(len(record.getMessage()) for record in caplog.records) < 10_000
    assert len(capfd.readouterr().err) < 10_000


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", f"/{LONG}"),
        ("POST", f"/{LONG}"),
        ("GET", f"/v1/models/{LONG}"),
        ("POST", f"/v1/models/{LONG}"),
        ("GET", f"/fleet/{LONG}"),
    ],
)
async def test_long_path_gets_the_envelope(
    start_cortex: StartCortex, benjy: V1Neuron, method: str, target: str
) -> None:
    """A huge path gets the usual error body, which does not repeat it."""
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    async with connected(cortex.url) as client:
        answer = await client.ask(request(method=method, target=target))
    assert answer.status in (404, 405)
    error = json.loads(answer.body)["error"]
    assert error["message"]
    assert error["code"]
    assert len(answer.body) < 1000


async def test_long_query_and_header_are_served(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """cortex forwards a cookie of 60 KiB to its control app."""
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    async with connected(cortex.url) as client:
        for ask in (
            request(method="GET", target=f"/v1/models?x={LONG}"),
            request(b"", f"Cookie: {LONG}", method="GET", target="/v1/models"),
            request(b"", *(f"X-{number}: 1" for number in range(240)), method="GET", target="/v1/models"),
        ):
            answer = await client.ask(ask)
            assert (answer.status, json.loads(answer.body)["data"][0]["id"]) == (200, MODEL)


async def test_large_body_on_a_real_network(
    start_cortex: StartCortex, benjy: V1Neuron, far: FarHost, caplog: pytest.LogCaptureFixture
) -> None:
    """A large body reaches an engine that begins to read late, in small segments, without loss and without log
    lines."""
    async with RawEngine().running(far.listening()) as engine:
        engine.reads = False
        benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
        # On a busy machine a neuron may answer late, which would be logged.
        cortex = await start_cortex([benjy], [{"id": MODEL}], poll={"timeout_secs": 60})
        caplog.clear()
        body = json.dumps({"model": MODEL, "n": 1, "prompt": "x" * 20_000_000}).encode()
        async with connected(cortex.url) as client:
            await client.send(request(body))
            await until(lambda: bool(engine.connections))
            engine.connections[0].read_on()
            answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["n"]) == (200, 1)
        assert engine.requests[0].body == body
    assert [record.getMessage() for record in caplog.records] == []
