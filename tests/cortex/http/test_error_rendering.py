"""An error looks the same whether aiohttp or cortex's own server writes it."""

from __future__ import annotations

import json

import pytest
from aiohttp import web

from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.http.server import accepting
from shared.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    RequestTooLarge,
    ServiceError,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    UpstreamError,
)
from shared.http import error_middleware
from shared.serve import Site, bind, serving
from tests.cortex.http.idle_dispatcher import IdleDispatcher
from tests.cortex.raw_http import Answer, connected, request

ERRORS = (
    ServiceError("a bug"),
    InvalidRequest("wrong: “é”", param="model"),
    Unauthorized("no key"),
    NotFound("no such model", code="model_not_found", param="model", extra={"free_mb": 5}),
    Conflict("loaded already", code="already_loaded"),
    RequestTooLarge("too large"),
    TooManyRequests("the queue is full", code="waiting_room_full", retry_after=17.2),
    UpstreamError("no engine"),
    Unavailable("no neuron is healthy", retry_after=5),
    ServiceError("not this one", status=405, code="method_not_allowed", headers={"allow": "GET,HEAD"}),
)
OWN_FRAMING = {"connection", "content-length", "date", "server"}
"""Headers of the transport."""


class RefusesAll(IdleDispatcher):
    """A dispatcher and handler that refuses each request with the same error."""

    def __init__(self, error: ServiceError) -> None:
        self._error = error

    def handle(self, client: ClientConnection, request: Request) -> RefusesAll:
        self._client = client
        return self

    def begin(self) -> None:
        self._client.refuse(self._error, "an-id")


async def from_aiohttp(error: ServiceError, sent: bytes) -> Answer:
    async def fail(request: web.Request) -> web.Response:
        raise error

    app = web.Application(middlewares=[error_middleware])
    app.router.add_route("POST", "/{path:.*}", fail)
    site = Site(app, bind("127.0.0.1", 0))
    async with serving([site], drain_timeout_secs=0), connected(f"http://127.0.0.1:{site.port}") as client:
        return await client.ask(sent)


async def from_cortex(error: ServiceError, sent: bytes) -> Answer:
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    async with (
        accepting(RefusesAll(error), [sock], drain_timeout_secs=0),
        connected(f"http://127.0.0.1:{port}") as client,
    ):
        return await client.ask(sent)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{error.status}-{error.code}")
async def test_both_transports_render_an_error_alike(error: ServiceError, path: str) -> None:
    """Status line, headers and body, in OpenAI's and in Anthropic's shape."""
    sent = request(b"{}", "x-request-id: an-id", target=path)
    ours, aiohttps = await from_cortex(error, sent), await from_aiohttp(error, sent)
    assert (ours.start, ours.body) == (aiohttps.start, aiohttps.body)
    assert json.loads(ours.body)["error"]["message"] == error.message
    assert ours.get("x-request-id") == "an-id"
    headers = [
        {name: value for name, value in answer.headers if name not in OWN_FRAMING} for answer in (ours, aiohttps)
    ]
    assert headers[0] == headers[1]
