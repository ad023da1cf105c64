"""Errors, bodies, request ids and tokens, over a real socket."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from pydantic import BaseModel, ConfigDict

from shared.errors import NotFound, Unavailable, internal_error
from shared.http import error_middleware, read_model, reply, request_id_of, require_token
from shared.serve import Site, bind, serving

TOKEN = "sécret-token"
Get = Callable[..., Awaitable[tuple[aiohttp.ClientResponse, Any]]]


class Inner(BaseModel):
    size: int


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    inner: Inner | None = None


async def boom(request: web.Request) -> web.Response:
    raise RuntimeError("a secret in a traceback")


async def missing(request: web.Request) -> web.Response:
    raise NotFound("no such thing", code="model_not_found", param="model")


async def busy(request: web.Request) -> web.Response:
    raise Unavailable("later", code="neuron_unavailable", retry_after=4.2)


async def echo(request: web.Request) -> web.Response:
    return reply(await read_model(request, Body), status=201)


async def show_id(request: web.Request) -> web.Response:
    assert request_id_of(request) == request_id_of(request)
    return web.json_response({"id": request_id_of(request)})


async def moved(request: web.Request) -> web.Response:
    raise web.HTTPFound("/id")


ROUTES = [
    web.get("/boom", boom),
    web.get("/missing", missing),
    web.get("/busy", busy),
    web.post("/v1/messages", missing),
    web.post("/echo", echo),
    web.get("/id", show_id),
    web.get("/moved", moved),
]


@pytest.fixture
async def ask() -> AsyncIterator[Get]:
    """Sends requests to a server with the error middleware, with closed=True to one that requires a token. Returns the
    response and its JSON."""
    open_app = web.Application(middlewares=[error_middleware], client_max_size=1000)
    open_app.add_routes(ROUTES)
    closed_app = web.Application(middlewares=[error_middleware, require_token(TOKEN)])
    closed_app.add_routes(ROUTES)
    sites = [Site(open_app, bind("127.0.0.1", 0)), Site(closed_app, bind("127.0.0.1", 0))]
    async with serving(sites, drain_timeout_secs=0), aiohttp.ClientSession() as session:

        async def get(method: str, path: str, *, closed: bool = False, **options: Any) -> tuple[Any, Any]:
            url = f"http://127.0.0.1:{sites[closed].port}{path}"
            async with session.request(method, url, allow_redirects=False, **options) as response:
                text = await response.text()
                return response, await response.json() if text and response.content_type.endswith("json") else text

        yield get


async def test_service_errors_become_the_envelope(ask: Get) -> None:
    """Status, code, param, Retry-After rounded up, and the request id on every response."""
    response, body = await ask("GET", "/missing")
    assert response.status == 404
    assert body["error"] == {
        "message": "no such thing",
        "type": "invalid_request_error",
        "code": "model_not_found",
        "param": "model",
    }
    assert "Retry-After" not in response.headers
    assert response.headers["x-request-id"]
    response, body = await ask("GET", "/busy")
    assert (response.status, response.headers["Retry-After"]) == (503, "5")


async def test_errors_of_messages_have_anthropics_shape(ask: Get) -> None:
    """Anthropic clients read no other shape."""
    _, body = await ask("POST", "/v1/messages")
    assert body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "no such thing", "code": "model_not_found"},
    }


async def test_an_unhandled_exception_is_a_500_without_details(ask: Get, caplog: pytest.LogCaptureFixture) -> None:
    """The traceback goes to the log, not to the client."""
    response, body = await ask("GET", "/boom")
    assert (response.status, body) == (500, internal_error().body())
    assert "secret" not in str(body)
    assert "a secret in a traceback" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nowhere", 404, "not_found"), ("GET", "/echo", 405, "method_not_allowed")],
)
async def test_aiohttps_own_errors_become_the_envelope(
    ask: Get, method: str, path: str, status: int, code: str
) -> None:
    """404 for an unknown path; 405 with Allow for a wrong method."""
    response, body = await ask(method, path)
    assert (response.status, body["error"]["code"]) == (status, code)
    assert ("Allow" in response.headers) is (status == 405)


async def test_redirects_pass(ask: Get) -> None:
    """An HTTPException below 400 passes unchanged."""
    response, _ = await ask("GET", "/moved")
    assert (response.status, response.headers["Location"]) == (302, "/id")


async def test_body_over_the_limit_is_413(ask: Get) -> None:
    """The error has the usual envelope, even if the handler does not check."""
    response, body = await ask("POST", "/echo", data=b"x" * 2000)
    assert (response.status, body["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("data", "param", "text"),
    [
        (b"", None, "not valid JSON"),
        (b"{", None, "not valid JSON"),
        (b"[" * 900, None, "not valid JSON"),
        (b"\xff", None, "not valid JSON"),
        (b"[]", "body", "body:"),
        (b"{}", "name", "name: required, but missing"),
        (b'{"name": 5}', "name", "name: must be a string"),
        (b'{"name": "x", "inner": {"size": "big"}}', "inner.size", "inner.size: "),
        (b'{"name": "x", "nam": 1}', "nam", "nam: unknown field"),
    ],
)
async def test_invalid_bodies_name_the_field(ask: Get, data: bytes, param: str | None, text: str) -> None:
    """400 invalid_request with the field as `param` and the reason in the message."""
    response, body = await ask("POST", "/echo", data=data)
    assert (response.status, body["error"]["code"], body["error"]["param"]) == (400, "invalid_request", param)
    assert text in body["error"]["message"]


async def test_valid_body_round_trips(ask: Get) -> None:
    """reply inverts read_model."""
    response, body = await ask("POST", "/echo", json={"name": "x", "inner": {"size": 2}})
    assert (response.status, body) == (201, {"name": "x", "inner": {"size": 2}})


@pytest.mark.parametrize("given", ["abc", "A.b_c:d-9", "x" * 128])
async def test_a_safe_request_id_is_kept(ask: Get, given: str) -> None:
    """A client can find its request in our log."""
    response, body = await ask("GET", "/id", headers={"x-request-id": given})
    assert response.headers["x-request-id"] == body["id"] == given


@pytest.mark.parametrize("given", ["", " ", "x" * 129, "a b", "a;b", "é", "<script>", "a\tb"])
async def test_an_unsafe_request_id_is_replaced(ask: Get, given: str) -> None:
    """The id is written to logs and headers, so a client must not inject anything."""
    response, body = await ask("GET", "/id", headers={"x-request-id": given})
    assert re.fullmatch("[0-9a-f]{32}", body["id"])
    assert response.headers["x-request-id"] == body["id"]


@pytest.mark.parametrize(
    ("header", "passes"),
    [
        (None, False),
        ("", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("Bearer wrong", False),
        (f"Basic {TOKEN}", False),
        (TOKEN, False),
        (f"Bearer {TOKEN}x", False),
        (f"Bearer {TOKEN}", True),
        (f"bearer   {TOKEN} ", True),
    ],
)
async def test_token(ask: Get, header: str | None, passes: bool) -> None:
    """Only the bearer token is accepted, and a 401 says how to authenticate. The scheme is case-insensitive."""
    headers = {} if header is None else {"Authorization": header}
    response, body = await ask("GET", "/id", closed=True, headers=headers)
    assert response.status == (200 if passes else 401)
    if not passes:
        assert body["error"]["code"] == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"


async def test_unknown_paths_need_a_token_too(ask: Get) -> None:
    """A caller without the token cannot find out which paths exist."""
    assert (await ask("GET", "/nowhere", closed=True))[0].status == 401
