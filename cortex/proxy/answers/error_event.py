"""The last event of a stream that ends in an error, in the dialect of its path. Pure."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from shared.errors import ServiceError, UpstreamError, anthropic_error_type, event_body, is_anthropic_path
from shared.protocol import ErrorCode

_RESPONSES: Final = b"/v1/responses"
_NUMBER: Final = re.compile(rb'"sequence_number": ?(\d+)')
_RESPONSE_OBJECT: Final = re.compile(rb'"response"\s*:\s*\{')
_SEPARATORS: Final = re.compile(r"[\s,:]*")
_IDENTITY: Final = ("id", "created_at", "model")

INVALID_PROMPT: Final = "invalid_prompt"
"""The only code of a failed response after which Codex shows the message at once, without five more requests."""

MAX_QUOTED: Final = 2000
"""Characters to quote of an engine's error that is not JSON."""


def error_event(path: bytes, error: ServiceError, *, start: bytes = b"", end: bytes = b"", model: str = "") -> bytes:
    """The event for an error of cortex, after an engine's events that begin with `start` and end in `end`. `model` is
    what the engine was asked for."""
    body = event_body(error, anthropic=is_anthropic_path(path))
    return _event(path, body, begun=_begun_response(start, model), end=end, permanent=error.permanent)


def engine_error_event(path: bytes, status: int, body: bytes) -> bytes:
    """The event for an engine's answer that is not a stream: the engine's own error if it has an error's shape, else an
    `upstream_error` that quotes it."""
    anthropic = is_anthropic_path(path)
    given = _json_object(body)
    error = given.get("error")
    if status >= 400 and isinstance(error, dict):
        if anthropic and given.get("type") != "error":
            given = {"type": "error", "error": {"type": anthropic_error_type(status), **_without_type(error)}}
        return _event(path, given)
    message = _message(status, given, body)
    ours = UpstreamError(message, code=ErrorCode.UPSTREAM_ERROR, status=status if status >= 400 else None)
    return error_event(path, ours)


def _event(
    path: bytes,
    body: dict[str, Any],
    *,
    begun: Mapping[str, Any] = MappingProxyType({}),
    end: bytes = b"",
    permanent: bool = False,
) -> bytes:
    if is_anthropic_path(path):
        return _named("error", body)
    if path == _RESPONSES:
        numbers = _NUMBER.findall(end)
        number = int(numbers[-1]) + 1 if numbers else 0
        return _named("response.failed", _failed_response(body, begun, number, permanent=permanent))
    return f"data: {json.dumps(body)}\n\n".encode()


def _named(name: str, body: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(body)}\n\n".encode()


def _begun_response(start: bytes, model: str) -> dict[str, Any]:
    """The identity of the response that a stream's `response.created` began, {} without one. Of a long event only the
    beginning is in `start`: then `model` stands in for the engine's."""
    found = _RESPONSE_OBJECT.search(start)
    if found is None:
        return {}
    text, position, members = start[found.end() :].decode("utf-8", "replace"), 0, {"model": model}
    decode = json.JSONDecoder().raw_decode
    with contextlib.suppress(ValueError, RecursionError):  # the end of the object, or of what is kept of it
        while True:
            name, position = decode(text, _after_separators(text, position))
            value, position = decode(text, _after_separators(text, position))
            if name in _IDENTITY:
                members[name] = value
    return members if "id" in members else {}


def _after_separators(text: str, position: int) -> int:
    found = _SEPARATORS.match(text, position)
    assert found is not None
    return found.end()


def _failed_response(body: dict[str, Any], begun: Mapping[str, Any], number: int, *, permanent: bool) -> dict[str, Any]:
    """What Codex shows: it ignores an event without a `type`. `error` at the top makes the openai packages raise; their
    models would otherwise need a `response.created` before it."""
    error = body["error"]
    response: dict[str, Any] = {
        "id": "resp_failed",
        **begun,
        "object": "response",
        "status": "failed",
        "error": {"code": INVALID_PROMPT if permanent else failure_code(error), "message": str(error.get("message"))},
        "incomplete_details": None,
        "output": [],
        "usage": None,
    }
    return {"type": "response.failed", "sequence_number": number, "response": response, **body}


def failure_code(error: dict[str, Any]) -> str:
    """cortex's code, or for an engine's error, whose `code` is the status, what OpenAI's API would say: Codex shortens
    the conversation after a `context_length_exceeded`."""
    code = error.get("code")
    if isinstance(code, str):
        return code
    if error.get("param") == "input_tokens":
        return "context_length_exceeded"
    return INVALID_PROMPT if isinstance(code, int) and code < 500 else "server_error"


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
