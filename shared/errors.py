"""Errors that reach a client, as data. Pure.

    ServiceError
    ├── InvalidRequest        400 invalid_request
    ├── Unauthorized          401 invalid_api_key
    ├── Forbidden             403 forbidden
    ├── NotFound              404 (code given)
    ├── Conflict              409 (code given)
    ├── RequestTooLarge       413 request_too_large
    ├── TooManyRequests       429 (code given)
    ├── UpstreamError         502 (code given)
    └── Unavailable           503 (code given), with Retry-After

Services raise these. `render` decides what the client gets; `shared.http` writes that through aiohttp and
`cortex.http.responses` as bytes. `event_body` is for an error of an answer that has begun.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from shared.protocol.errors import ErrorCode
from shared.retry_after import whole_seconds

MAX_SHOWN_CHARS = 256
"""Of a name in a message; model ids and paths of model files are shorter."""


class ServiceError(Exception):
    """A failure with the status, code and message that the client gets.

    `retry_after` is in seconds; it becomes the Retry-After header (`shared.retry_after`). `param` names the field.
    `status` replaces that of the class. `headers` are further headers of the answer, names in lower case. `permanent`:
    retrying is useless, at least for a long time; the client libraries of OpenAI and Anthropic then do not retry.
    """

    status = 500
    default_code: str = ErrorCode.INTERNAL_ERROR

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        extra: dict[str, Any] | None = None,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        permanent: bool = False,
    ) -> None:
        super().__init__(message)
        if status is not None:
            self.status = status
        self.message = message
        self.code = str(code or self.default_code)
        self.param = param
        self.retry_after = None if retry_after is None else whole_seconds(retry_after)
        self.extra = extra or {}
        self.headers = headers or {}
        self.permanent = permanent

    @property
    def type(self) -> str:
        return error_type(self.status)

    def body(self) -> dict[str, Any]:
        """OpenAI's error envelope: `{"error": {message, type, code, param}}`, the fields of `extra` beside them."""
        error = {"message": self.message, "type": self.type, "code": self.code, "param": self.param, **self.extra}
        return {"error": error}

    def anthropic_body(self) -> dict[str, Any]:
        """Anthropic's error envelope."""
        kind = anthropic_error_type(self.status)
        if self.permanent and kind == _OVERLOADED:  # Claude Code retries it ten times, whatever the headers say
            kind = "api_error"
        return {"type": "error", "error": {"type": kind, "message": self.message, "code": self.code}}


def event_body(error: ServiceError, *, anthropic: bool) -> dict[str, Any]:
    """The body of an error whose answer has begun with 200. What headers would say are fields of `error`: `retry_after`
    (seconds), and `should_retry: false` for a permanent one."""
    body = error.anthropic_body() if anthropic else error.body()
    if error.permanent:
        body["error"]["should_retry"] = False
    if error.retry_after is not None:
        body["error"]["retry_after"] = error.retry_after
    return body


class RenderedError(NamedTuple):
    """An error as the client gets it. The transport adds what frames the body."""

    status: int
    headers: dict[str, str]
    body: bytes


def render(error: ServiceError, request_id: str, *, anthropic: bool) -> RenderedError:
    """Status, headers (names in lower case) and body of an error, in OpenAI's shape or in Anthropic's."""
    headers = {"content-type": "application/json; charset=utf-8", "x-request-id": request_id, **error.headers}
    if anthropic:
        headers["request-id"] = request_id
    if error.permanent:  # client libraries read it before Retry-After, which says when a load is tried again at all
        headers["x-should-retry"] = "false"
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = error.anthropic_body() if anthropic else error.body()
    return RenderedError(error.status, headers, json.dumps(body).encode())


def shortened(text: str) -> str:
    """`text` for a message or a log line: only the start of a long name, because a client may send a megabyte."""
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "…"


def is_anthropic_path(path: str | bytes) -> bool:
    """True for routes whose errors have Anthropic's shape."""
    if isinstance(path, bytes):
        path = path.decode("latin-1")
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def error_type(status: int) -> str:
    """The `type` of an error body for an HTTP status."""
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "api_error"


_OVERLOADED = "overloaded_error"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: _OVERLOADED,
}


def anthropic_error_type(status: int) -> str:
    """Anthropic's name for an HTTP status."""
    return _ANTHROPIC_TYPES.get(status, error_type(status))


def internal_error() -> ServiceError:
    """For a bug, after it has been logged."""
    return ServiceError("internal error: the service's log has the details")


class InvalidRequest(ServiceError):
    status = 400
    default_code = ErrorCode.INVALID_REQUEST


class Unauthorized(ServiceError):
    status = 401
    default_code = ErrorCode.INVALID_API_KEY


class Forbidden(ServiceError):
    status = 403
    default_code = ErrorCode.FORBIDDEN


class NotFound(ServiceError):
    status = 404
    default_code = ErrorCode.NOT_FOUND


class Conflict(ServiceError):
    status = 409

    def __init__(
        self, message: str, *, code: str, param: str | None = None, extra: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message, code=code, param=param, extra=extra)


class RequestTooLarge(ServiceError):
    status = 413
    default_code = ErrorCode.REQUEST_TOO_LARGE


class TooManyRequests(ServiceError):
    status = 429
    default_code = ErrorCode.RATE_LIMIT_EXCEEDED


class UpstreamError(ServiceError):
    status = 502
    default_code = ErrorCode.UPSTREAM_UNREACHABLE


class Unavailable(ServiceError):
    """A temporary failure, with a Retry-After unless it is permanent."""

    status = 503
    default_code = ErrorCode.UNAVAILABLE

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retry_after: float,
        extra: dict[str, Any] | None = None,
        permanent: bool = False,
    ) -> None:
        super().__init__(message, code=code, retry_after=retry_after, extra=extra, permanent=permanent)
