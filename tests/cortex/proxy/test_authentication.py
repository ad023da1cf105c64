"""The place where a check of API keys goes works, although cortex has no keys yet."""

from __future__ import annotations

import json

import pytest

from cortex.accounts.caller import Caller
from cortex.app import working
from cortex.config.settings import CortexConfig
from cortex.upstream.address import Address
from shared.errors import Unauthorized
from shared.serve import bind
from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import connected, request

MODEL = "org/small"


def only_alice(api_key: bytes | None) -> Caller:
    if api_key != b"alice's key":
        raise Unauthorized("this key is unknown")
    return Caller("1", "alice")


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/messages", "/fleet", "/v1/models", "/nope"])
async def test_an_error_of_authenticate_becomes_the_answer(
    start_cortex: StartCortex, benjy: V1Neuron, target: str
) -> None:
    """On every route, before the request reaches an engine or the control; a known key passes."""
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    sock = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    method, body = ("POST", json.dumps({"model": MODEL}).encode()) if target.startswith("/v1/") else ("GET", b"")
    serving = working(cortex.parts.resolver, CortexConfig(), [sock], Address("127.0.0.1", 1), authenticate=only_alice)
    async with serving, connected(url) as client:
        refused = await client.ask(request(body, "Authorization: Bearer x", method=method, target=target), method)
        known = await client.ask(
            request(body, "Authorization: Bearer alice's key", method=method, target=target), method
        )
    assert (refused.status, dict(refused.headers)["www-authenticate"]) == (401, "Bearer")
    assert json.loads(refused.body)["error"]["message"] == "this key is unknown"
    assert known.status != 401
