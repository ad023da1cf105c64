"""The classifier of answers: what it calls complete, an error, and a violation."""

from __future__ import annotations

import json

import pytest

from tests.e2e.chaos.outcomes import Kind, of_refusal, of_stream, of_whole

DONE = b"data: [DONE]\n\n"


def chunk(finish: str | None = None, *, name: str = "c1", model: str = "m") -> bytes:
    data = {"id": name, "model": model, "choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": finish}]}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def error(code: str = "upstream_lost") -> bytes:
    data = {"error": {"message": "lost", "type": "api_error", "code": code, "param": None}}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def message(kind: str, **fields: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


MESSAGE = message("message_start", message={"id": "a", "model": "m"}) + message("content_block_delta", index=0)
MESSAGE_END = message("message_delta", delta={"stop_reason": "end_turn"}) + message("message_stop")
RESPONSE = message("response.created", response={"id": "r", "model": "m"})
RESPONSE_END = message("response.completed", response={"id": "r", "model": "m"})


@pytest.mark.parametrize(
    ("dialect", "body", "kind"),
    [
        ("chat", chunk() + chunk("length") + DONE, Kind.COMPLETE),
        ("chat", b": loading\n\n" + chunk("length") + DONE, Kind.COMPLETE),
        ("messages", MESSAGE + MESSAGE_END, Kind.COMPLETE),
        ("responses", RESPONSE + RESPONSE_END, Kind.COMPLETE),
        ("chat", chunk() + error(), Kind.ERROR),
        ("chat", error("cold_load_failed"), Kind.ERROR),
        ("chat", chunk() + chunk()[:20] + b"\n\n" + error(), Kind.ERROR),
        ("chat", chunk() + error("500") + DONE, Kind.ERROR),
        ("messages", MESSAGE + message("error", error={"type": "api_error", "message": "x"}), Kind.ERROR),
        ("responses", RESPONSE + message("error", code="500", message="x"), Kind.ERROR),
        ("chat", b"", Kind.VIOLATION),
        ("chat", chunk(), Kind.VIOLATION),
        ("chat", chunk("length"), Kind.VIOLATION),
        ("chat", chunk() + DONE, Kind.VIOLATION),
        ("chat", DONE + chunk("length"), Kind.VIOLATION),
        ("chat", chunk("length") + DONE + DONE, Kind.VIOLATION),
        ("chat", chunk() + chunk("length", name="c2") + DONE, Kind.VIOLATION),
        ("chat", chunk("length", model="other") + DONE, Kind.VIOLATION),
        ("chat", chunk() + chunk()[:20], Kind.VIOLATION),
        ("chat", chunk()[:20] + b"\n\n" + chunk("length") + DONE, Kind.VIOLATION),
        ("chat", chunk() + error() + DONE, Kind.VIOLATION),
        ("chat", error() + chunk("length") + DONE, Kind.VIOLATION),
        ("chat", error() + error(), Kind.VIOLATION),
        ("messages", MESSAGE, Kind.VIOLATION),
        ("responses", RESPONSE, Kind.VIOLATION),
        ("chat", b"<html>", Kind.VIOLATION),
    ],
)
def test_streams(dialect: str, body: bytes, kind: Kind) -> None:
    """A stream's bytes tell whether it is complete, an error or cut."""
    outcome = of_stream(dialect, "m", body)
    assert outcome.kind is kind, outcome


@pytest.mark.parametrize(
    ("dialect", "answer", "kind"),
    [
        ("chat", {"model": "m", "choices": [{}]}, Kind.COMPLETE),
        ("messages", {"model": "m", "content": [{}]}, Kind.COMPLETE),
        ("responses", {"model": "m", "output": [{}]}, Kind.COMPLETE),
        ("chat", {"model": "other", "choices": [{}]}, Kind.VIOLATION),
        ("chat", {"model": "m", "content": [{}]}, Kind.VIOLATION),
        ("chat", {}, Kind.VIOLATION),
        ("chat", [], Kind.VIOLATION),
    ],
)
def test_whole_answers(dialect: str, answer: object, kind: Kind) -> None:
    """A plain answer is complete only with its own model and the fields of its API, up to the last byte."""
    body = json.dumps(answer).encode()
    assert of_whole(dialect, "m", body).kind is kind
    assert of_whole(dialect, "m", body[:-1]).kind is Kind.VIOLATION


@pytest.mark.parametrize(
    ("status", "headers", "error", "kind"),
    [
        (503, {"Retry-After": "1"}, {"message": "x", "type": "api_error", "code": "cold_load_failed"}, Kind.ERROR),
        (500, {}, {"message": "x", "type": "InternalServerError", "code": 500}, Kind.ERROR),
        (503, {}, {"message": "x", "type": "api_error", "code": "cold_load_failed"}, Kind.VIOLATION),
        (429, {}, {"message": "x", "type": "rate_limit_error", "code": "too_many_waiting"}, Kind.VIOLATION),
        (500, {}, "flat", Kind.VIOLATION),
        (500, {}, {"type": "api_error", "code": "x"}, Kind.VIOLATION),
        (204, {}, {"message": "x", "type": "api_error", "code": "x"}, Kind.VIOLATION),
    ],
)
def test_refusals(status: int, headers: dict[str, str], error: object, kind: Kind) -> None:
    """An error body must have the envelope, and a 503 or 429 also Retry-After."""
    assert of_refusal(status, headers, json.dumps({"error": error}).encode()).kind is kind
