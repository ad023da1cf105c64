"""The last event of a stream that ends in an error, on each path."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cortex.proxy.answers.error_event import engine_error_event, error_event
from shared.errors import Unavailable, render

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


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/messages", b"/v1/responses"])
def test_permanent_errors_say_that_retrying_is_useless(path: bytes) -> None:
    """The headers have been sent, so a field says it."""
    _, data = parsed(error_event(path, Unavailable("no such path", retry_after=7, permanent=True)))
    assert data["error"]["should_retry"] is False
    assert data["error"]["retry_after"] == 7
    headers = render(Unavailable("no such path", retry_after=7, permanent=True), "r", anthropic=False).headers
    assert headers["x-should-retry"] == "false"
    assert headers["retry-after"] == "7"


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


CREATED = {
    "type": "response.created",
    "response": {
        "id": "resp_1",
        "created_at": 1700000000,
        "instructions": 'model \\ "model": "x"',
        "metadata": {"model": "y"},
        "model": "org/small",
        "object": "response",
        "status": "in_progress",
        "output": [],
    },
}


def test_failed_response_is_the_one_that_began() -> None:
    """Clients match events by the response's id, so `response.failed` repeats what `response.created` said."""
    for start in (json.dumps(CREATED), json.dumps(CREATED, separators=(",", ":"))):
        _, data = parsed(error_event(b"/v1/responses", FAILED, start=b"data: %b\n\n" % start.encode(), model="other"))
        response = data["response"]
        assert (response["id"], response["created_at"]) == ("resp_1", 1700000000)
        assert (response["model"], response["status"], response["object"]) == ("org/small", "failed", "response")


@pytest.mark.parametrize("kept", range(len(json.dumps(CREATED))))
def test_failed_response_after_a_part_of_its_start(kept: int) -> None:
    """Only the beginning of a long event is kept: the model is then the one that was asked for."""
    start = json.dumps(CREATED).encode()[:kept]
    _, data = parsed(error_event(b"/v1/responses", FAILED, start=start, model="org/small"))
    if b'"created_at": 1700000000,' in start:
        assert (data["response"]["id"], data["response"]["created_at"]) == ("resp_1", 1700000000)
    assert data["response"].get("model", "org/small") == "org/small"


@pytest.mark.parametrize(
    "sent",
    [
        b'data: {"type": "response.created", "sequence_number": 0}\n\ndata: {"sequence_number": 41, "delta": "x"}\n\n',
        b'data: {"sequence_number":41,"delta":"x"}\n\n',
    ],
)
def test_sequence_numbers_continue_after_a_lost_response(sent: bytes) -> None:
    """The error event has the number after the last one that the client received."""
    _, data = parsed(error_event(b"/v1/responses", FAILED, end=sent))
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
