"""Why a neuron is down: operators and clients read it, so it says what is wrong and what to check."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass

import pytest

from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Script, answering, closing, plain
from tests.ports import free_port

TLS_ALERT = b"\x15\x03\x01\x00\x02\x02\x46"
UNAUTHORIZED = plain(b'{"error": {"message": "a valid bearer token is required"}}', status="401 Unauthorized")


@dataclass
class Far:
    """A neuron's entry in cortex.toml."""

    url: str
    token: str | None = None
    name: str = "far"


async def reason(start_cortex: StartCortex, neuron: Far) -> str:
    """What cortex says of a neuron that it cannot use: the same in `/fleet` and to a client."""
    cortex = await start_cortex([neuron], [{"id": "m"}], wait_healthy=False)
    await cortex.until(lambda: cortex.parts.fleet.node("far").misses > 0)
    async with cortex.http.get(f"{cortex.url}/fleet") as answer:
        node = (await answer.json())["nodes"][0]
    assert abs(time.time() - node["silent_since"]) < 5
    async with cortex.chat("m") as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (503, "no_healthy_neurons")
    assert error["message"] == f"no neuron is healthy (far: down: {node['last_error']})"
    async with cortex.http.get(f"{cortex.url}/health") as answer:
        assert answer.status == 503
        assert json.loads(await answer.text()) == {"status": "degraded", "nodes": {"healthy": 0, "total": 1}}
    return str(node["last_error"])


async def test_nothing_listens(start_cortex: StartCortex) -> None:
    """The port is in the message, without numbers of the operating system."""
    port = free_port()
    said = await reason(start_cortex, Far(f"http://127.0.0.1:{port}"))
    assert said == f"connection refused: nothing listens on 127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("script", "token", "pattern"),
    [
        pytest.param(
            answering(UNAUTHORIZED), None, "needs a token: set token or token_env in cortex.toml", id="no-token"
        ),
        pytest.param(answering(UNAUTHORIZED), "x", "refuses the token: token or token_env", id="token"),
        pytest.param(answering(TLS_ALERT), None, "needs https://", id="tls-alert"),
        pytest.param(closing(b""), None, "needs https://", id="tls-closes"),
        pytest.param(answering(b"SSH-2.0\r\n\r\n"), None, "invalid HTTP answer", id="not-http"),
        pytest.param(answering(plain(b"busy", status="500 X")), None, "HTTP 500: busy", id="status"),
    ],
)
async def test_wrong_answers(start_cortex: StartCortex, script: Script, token: str | None, pattern: str) -> None:
    """A token that is missing or wrong, TLS on the port, and other servers."""
    async with RawEngine().running() as server:
        server.script = script
        said = await reason(start_cortex, Far(server.url, token))
    assert re.search(pattern, said), said
    assert "far" not in said, "the caller names the neuron"


async def test_tls_to_a_plain_port(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The reverse: `https://` for a neuron without TLS."""
    said = await reason(start_cortex, Far(benjy.url.replace("http://", "https://")))
    assert "need http:// instead of https://" in said


async def test_unknown_host(start_cortex: StartCortex) -> None:
    """A name that does not resolve is named."""
    assert "'no-such-host.invalid'" in await reason(start_cortex, Far("http://no-such-host.invalid:1"))


async def test_a_fleet_without_neurons(start_cortex: StartCortex) -> None:
    """The message says what to configure. A fleet that finds its neurons has none at first, either."""
    cortex = await start_cortex([], [{"id": "m"}])
    async with cortex.chat("m") as answer:
        message = (await answer.json())["error"]["message"]
    assert message == "no neuron is known: add [[neurons]] to cortex.toml, or see [discovery] there"
