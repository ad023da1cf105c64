"""The last event of a stream that ends in an error, in the dialect of its path. Pure."""

from __future__ import annotations

import json
from typing import Any, Final

from shared.errors import ServiceError, UpstreamError, anthropic_error_type, is_anthropic_path
from shared.protocol import ErrorCode

MAX_QUOTED: Final = 2000
"""Characters to quote of an engine's error that is not JSON."""


def error_event(path: bytes, error: ServiceError) -> bytes:
    """The event for an error of cortex. Its `retry_after` (seconds) replaces the Retry-After header."""
    anthropic = is_anthropic_path(path)
    body = error.anthropic_body() if anthropic else error.body()
    if error.retry_after is not None:
        body["error"]["retry_after"] = error.retry_after
    return _event(body, anthropic=anthropic)


def engine_error_event(path: bytes, status: int, body: bytes) -> bytes:
    """The event for an engine's answer that is not a stream: the engine's own error if it has an error's shape, else an
    `upstream_error` that quotes it."""
    anthropic = is_anthropic_path(path)
    given = _json_object(body)
    error = given.get("error")
    if status >= 400 and isinstance(error, dict):
        if anthropic and given.get("type") != "error":
            given = {"type": "error", "error": {"type": anthropic_error_type(status), **_without_type(error)}}
        return _event(given, anthropic=anthropic)
    message = _message(status, given, body)
    ours = UpstreamError(message, code=ErrorCode.UPSTREAM_ERROR, status=status if status >= 400 else None)
    return error_event(path, ours)


def _event(body: dict[str, Any], *, anthropic: bool) -> bytes:
    data = json.dumps(body)
    return f"event: error\ndata: {data}\n\n".encode() if anthropic else f"data: {data}\n\n".encode()


def _json_object(body: bytes) -> dict[str, Any]:
    """`body` as a JSON object, {} if it is not one."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _without_type(error: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in error.items() if name != "type"}


def _message(status: int, given: dict[str, Any], body: bytes) -> str:
    if status < 400:
        return f"the engine answered {status} without an event stream"
    said = next((given[key] for key in ("error", "message", "detail") if isinstance(given.get(key), str)), None)
    if said is None:
        said = body.decode("utf-8", "replace").strip()[:MAX_QUOTED]
    return f"the engine answered {status}: {said}" if said else f"the engine answered {status}"
