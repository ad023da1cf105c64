"""Requests whose sender only the control knows: what becomes of them if that fails or the client leaves."""

from __future__ import annotations

import asyncio
import json
from typing import cast

import pytest

from cortex.http.connection import ClientConnection
from cortex.http.handler import Handler
from cortex.http.request import Request
from cortex.http.server import accepting
from cortex.proxy.request_kinds.unidentified import UnidentifiedRequest
from shared.errors import internal_error
from shared.serve import bind
from tests.cortex.http.idle_dispatcher import IdleDispatcher
from tests.cortex.raw_http import Truncated, connected, request


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


class BuggyDispatcher(IdleDispatcher):
    """Finds no handler or, as a handler itself, fails to begin."""

    def __init__(self, *, finds: bool) -> None:
        self._finds = finds
        self.abandoned = asyncio.Event()

    def handle(self, client: ClientConnection, request: Request) -> Handler:
        return UnidentifiedRequest(client, request, self._find)

    async def _find(self) -> Handler:
        if self._finds:
            return self
        raise RuntimeError("a bug")

    def begin(self) -> None:
        raise RuntimeError("a bug")

    def abandon(self) -> None:
        self.abandoned.set()


@pytest.mark.parametrize("finds", [False, True])
async def test_a_bug_leaves_no_client_without_an_end(finds: bool) -> None:
    """An error while nothing can be answered yet, otherwise a reset connection, as for requests with a key."""
    dispatcher, sock = BuggyDispatcher(finds=finds), bind("127.0.0.1", 0)
    async with (
        accepting(dispatcher, [sock], drain_timeout_secs=0),
        connected(f"http://127.0.0.1:{sock.getsockname()[1]}") as client,
    ):
        if finds:
            with pytest.raises((Truncated, ConnectionResetError)):
                await client.ask(request(b"{}"))
            await dispatcher.abandoned.wait()
        else:
            answer = await client.ask(request(b"{}"))
            assert (answer.status, json.loads(answer.body)["error"]["message"]) == (500, internal_error().message)
