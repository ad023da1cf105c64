"""aiohttp adapters: models and errors to responses, bodies to models, request ids, bearer tokens."""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from shared.cross_site import CrossSitePolicy, Sender, refused_media_type, refused_sender
from shared.errors import (
    InvalidRequest,
    RequestTooLarge,
    ServiceError,
    Unauthorized,
    internal_error,
    is_anthropic_path,
    render,
    shortened,
)
from shared.protocol import ErrorCode, first_problem
from shared.request_ids import request_id, request_scope

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Model = TypeVar("Model", bound=BaseModel)

EVENT_STREAM_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
"""Of server-sent events: proxies must neither keep nor collect them."""
KEEP_ALIVE_COMMENT = b": keep-alive\n"
"""Between two events. A blank line behind it would be an empty event to some clients."""

REQUEST_ID = web.RequestKey("request_id", str)

ANTHROPIC_VERSION = "anthropic-version"
"""The header that every request of Anthropic's clients has."""


def reply(model: BaseModel, *, status: int = 200) -> web.Response:
    """A wire model as a JSON response."""
    return web.Response(text=model.model_dump_json(), status=status, content_type="application/json")


def error_response(request: web.Request, error: ServiceError) -> web.Response:
    """The answer to `request` for `error`."""
    anthropic = is_anthropic_path(request.path) or ANTHROPIC_VERSION in request.headers
    rendered = render(error, request_id_of(request), anthropic=anthropic)
    return web.Response(body=rendered.body, status=rendered.status, headers=rendered.headers)


async def read_model(request: web.Request, model: type[Model]) -> Model:
    """The request's JSON body as `model`.

    Raises:
        InvalidRequest: the body is not JSON, or a field has the wrong type; the message names field and reason.
    """
    try:
        data = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    try:
        return model.model_validate(data)
    except ValidationError as error:
        where, reason = first_problem(error)
        raise InvalidRequest(f"{where or 'body'}: {reason}", param=where or "body") from error


def request_id_of(request: web.Request) -> str:
    """The request's id (`shared.request_ids`), the same each time."""
    if REQUEST_ID in request:
        return request[REQUEST_ID]
    given = request.headers.get("x-request-id")
    made = request_id(None if given is None else given.encode("utf-8", "surrogateescape"))
    request[REQUEST_ID] = made
    return made


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every failure into the error envelope. Cancellation passes: the client has disconnected."""
    own_id = request_id_of(request)
    with request_scope(own_id):
        response = await _answer(request, handler)
    if not response.prepared:
        response.headers.setdefault("x-request-id", own_id)
    return response


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ServiceError as error:
        return error_response(request, error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return error_response(request, _as_service_error(request, error))
    except web.RequestPayloadError as error:
        if request.transport is None or request.transport.is_closing():
            raise  # the client has disconnected
        return error_response(request, InvalidRequest(f"cannot read the body: {error}"))
    except ConnectionError:
        raise  # the client has disconnected
    except Exception:
        log.exception("unhandled error in %s %s", request.method, shortened(request.path))
        return error_response(request, internal_error())


def _as_service_error(request: web.Request, error: web.HTTPException) -> ServiceError:
    """aiohttp's own 404, 405, 413 and similar."""
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return RequestTooLarge(error.text or "the request body is too large")
    codes = {404: ErrorCode.NOT_FOUND, 405: ErrorCode.METHOD_NOT_ALLOWED}
    code = codes.get(error.status, ErrorCode.INVALID_REQUEST)
    headers = {"allow": error.headers["Allow"]} if "Allow" in error.headers else None
    message = f"{request.method} {shortened(request.path)}: {error.reason}"
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        headers = {"allow": allowed}
        message = f"{request.method} is not allowed for {shortened(request.path)}; allowed: {allowed}"
    return ServiceError(message, status=error.status, code=code, headers=headers)


async def hide_server(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: removes aiohttp's Server header, which names versions."""
    response.headers.popall("Server", None)


def bearer_token(headers: Mapping[str, str]) -> str | None:
    """The token of an `Authorization: Bearer` header, None without one."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def refuse_cross_site(policy: CrossSitePolicy) -> Any:
    """A middleware that refuses what a web page of another site made a browser send."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = request.headers
        sender = Sender(headers.get("Host"), headers.get("Origin"), headers.get("Sec-Fetch-Site"))
        error = refused_sender(sender, policy)
        if error is not None:
            raise error
        return await handler(request)

    return check


@web.middleware
async def require_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses bodies that are not JSON where a route would change state for them."""
    if request.match_info.http_exception is None:  # else it is a 404 or 405
        error = refused_media_type(request.method, request.headers.get("Content-Type"))
        if error is not None:
            raise error
    return await handler(request)


def require_token(token: str) -> Any:
    """A middleware that requires this bearer token."""
    expected = token.encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = bearer_token(request.headers)
        if given is None or not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected):
            raise Unauthorized("a valid bearer token is required")
        return await handler(request)

    return check
