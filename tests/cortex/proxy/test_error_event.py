"""The last event of a stream that ends in an error, on each path."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cortex.proxy.answers.error_event import engine_error_event, error_event
from shared.errors import Unavailable

FAILED = Unavailable("no such path", code="cold_load_failed", retry_after=7)


def parsed(event: bytes) -> tuple[str | None, Any]:
    """The event's name and data."""
    assert event.endswith(b"\n\n")
    lines = event.decode().rstrip("\n").split("\n")
    fields = dict(line.split(": ", 1) for line in lines)
    return fields.get("event"), json.loads(fields["data"])


def test_chats_get_the_envelope() -> None:
    """Chat and completion streams get OpenAI's error envelope as an event."""
    name, data = parsed(error_event(b"/v1/chat/completions", FAILED))
    assert name is None
    assert data == {
        "error": {
            "message": "no such path",
            "type": "api_error",
            "code": "cold_load_failed",
            "param": None,
            "retry_after": 7,
        }
    }


@pytest.mark.parametrize(("permanent", "kind"), [(False, "overloaded_error"), (True, "api_error")])
def test_messages_get_anthropics_error(permanent: bool, kind: str) -> None:
    """Claude Code repeats an overloaded_error ten times."""
    error = Unavailable("no such path", code="cold_load_failed", retry_after=7, permanent=permanent)
    name, data = parsed(error_event(b"/v1/messages", error))
    assert (name, data["type"]) == ("error", "error")
    assert data["error"]["type"] == kind
    assert data["error"]["message"] == "no such path"


def test_responses_fail() -> None:
    """Codex reads `response.error`; the openai packages raise for the `error` at the top."""
    name, data = parsed(error_event(b"/v1/responses", FAILED))
    assert (name, data["type"], data["sequence_number"]) == ("response.failed", "response.failed", 0)
    assert data["response"]["status"] == "failed"
    assert data["response"]["error"] == {"code": "cold_load_failed", "message": "no such path"}
    assert data["error"]["message"] == "no such path"
    lasting = Unavailable("no such path", code="cold_load_failed", retry_after=7, permanent=True)
    _, data = parsed(error_event(b"/v1/responses", lasting))
    assert (data["response"]["error"]["code"], data["error"]["code"]) == ("invalid_prompt", "cold_load_failed")


@pytest.mark.parametrize(
    "sent",
    [
        b'data: {"type": "response.created", "sequence_number": 0}\n\ndata: {"sequence_number": 41, "delta": "x"}\n\n',
        b'data: {"sequence_number":41,"delta":"x"}\n\n',
    ],
)
def test_sequence_numbers_continue_after_a_lost_response(sent: bytes) -> None:
    """The error event has the number after the last one that the client received."""
    _, data = parsed(error_event(b"/v1/responses", FAILED, sent=sent))
    assert data["sequence_number"] == 42


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (400, {"message": "bad", "code": 400, "param": None}, "invalid_prompt"),
        (400, {"message": "too long", "code": 400, "param": "input_tokens"}, "context_length_exceeded"),
        (500, {"message": "broken", "code": 500}, "server_error"),
        (404, {"message": "own", "code": "own_code"}, "own_code"),
    ],
)
def test_codes_of_an_engines_error_are_those_of_the_api(status: int, error: dict[str, Any], code: str) -> None:
    name, data = parsed(engine_error_event(b"/v1/responses", status, json.dumps({"error": error}).encode()))
    assert name == "response.failed"
    assert data["response"]["error"] == {"code": code, "message": error["message"]}
    assert data["error"] == error
