"""Requests whose sender only the control knows: what becomes of them if that fails or the client leaves."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from cortex.http.connection import ClientConnection
from cortex.http.handler import Handler
from cortex.http.request import Request
from cortex.proxy.authentication import Authentication
from cortex.proxy.request_handler import RequestHandler
from cortex.proxy.request_kinds.unidentified import UnidentifiedRequest
from tests.cortex.accounts.sign_in.small_issuer import SmallIssuer
from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine
from tests.cortex.raw_http import Truncated, connected, request

MODEL = "org/small"
BODY = b'{"model": "org/small", "messages": []}'


async def test_a_client_that_leaves_at_once() -> None:
    """Before the search for the sender has begun, which then never does."""
    begun = False

    async def find() -> Handler:
        nonlocal begun
        begun = True
        await asyncio.Event().wait()
        raise AssertionError

    waiting = UnidentifiedRequest(cast("ClientConnection", None), cast("Request", None), find)
    waiting.begin()
    waiting.abandon()
    await asyncio.wait([waiting._task])
    assert (waiting._task.cancelled(), begun) == (True, False)


@pytest.mark.parametrize("step", ["identify", "begin"])
async def test_a_bug_leaves_no_client_without_an_end(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """An error while nothing is answered yet, otherwise a reset connection, as for requests with a key."""

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    async with SmallIssuer().running() as issuer:
        cortex = await start_cortex([benjy], [{"id": MODEL}], auth={"oidc": issuer.settings()})
        owner: type = Authentication if step == "identify" else RequestHandler
        monkeypatch.setattr(owner, step, fail)
        async with connected(cortex.url) as client:
            sent = request(BODY, f"Authorization: Bearer {issuer.token()}")
            if step == "identify":
                assert (await client.ask(sent)).status == 500
            else:
                with pytest.raises((Truncated, ConnectionResetError)):
                    await client.ask(sent)
