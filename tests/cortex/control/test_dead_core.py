"""An engine whose core is dead, or that shuts down, and whose server says so: the request goes elsewhere, once."""

from __future__ import annotations

import json

import pytest

from tests.cortex.conftest import RunningCortex
from tests.cortex.control.test_failover import (
    MODEL,
    answered_by,
    ask,
    beast,
    benjy,
    engine,
    one,
    other,
    two,
)
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, answering, plain, stream_head
from tests.cortex.raw_http import Answer, connected, request

__all__ = ["beast", "benjy", "engine", "one", "other", "two"]

DEAD = plain(
    b'{"error":{"message":"EngineCore encountered an issue. See stack trace (above) for the root cause.",'
    b'"type":"InternalServerError","param":null,"code":500}}',
    status="500 Internal Server Error",
)  # vLLM 0.32, whose core was killed
DEAD_MESSAGES = plain(
    b'{"type":"error","error":{"type":"InternalServerError",'
    b'"message":"EngineCore encountered an issue. See stack trace (above) for the root cause."}}',
    status="500 Internal Server Error",
)
STOPPING = plain(
    b'{"error":{"message":"cannot schedule new futures after shutdown","type":"InternalServerError","code":500}}',
    status="500 Internal Server Error",
)  # vLLM 0.32 after a SIGTERM
DEAD_EVENT = (
    b'data: {"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.",'
    b' "type": "InternalServerError", "param": null, "code": 500}}\n\n'
)
DEAD_EVENT_MESSAGES = (
    b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"2 validation errors for'
    b" ChatCompletionStreamResponse\\nmodel\\n  Field required [type=missing, input_value={'error': {'message':"
    b" 'En...am': None, 'code': 500}}, input_type=dict]\"}}\n\n"
)
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
EVENTS = b'data: {"id": "1"}\n\n'


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def ask_stream(cortex: RunningCortex, target: str = "/v1/chat/completions", version: str = "HTTP/1.1") -> Answer:
    body = json.dumps({"model": MODEL, "stream": True}).encode()
    async with connected(cortex.url) as client:
        return await client.ask(request(body, target=target, version=version))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("target", "version", "event"),
    [
        ("/v1/chat/completions", "HTTP/1.1", DEAD_EVENT),
        ("/v1/completions", "HTTP/1.0", DEAD_EVENT),
        ("/v1/messages", "HTTP/1.1", DEAD_EVENT_MESSAGES),
    ],
)
async def test_stream_that_begins_with_the_death_of_the_core_is_continued_elsewhere(
    two: RunningCortex, engine: RawEngine, other: RawEngine, apart: bool, *, target: str, version: str, event: bytes
) -> None:
    """vLLM sends the head before the first token. The core died in between: the client has heard nothing else, and gets
    one whole stream."""
    pieces = [stream_head(), chunk(event) + DONE]
    engine.script = answering(*(pieces if apart else [b"".join(pieces)]))
    other.script = answering(stream_head(), chunk(EVENTS) + DONE)
    answer = await ask_stream(two, target, version)
    assert (answer.status, answer.body) == (200, EVENTS + b"data: [DONE]\n\n")
    assert (len(engine.requests), len(other.requests)) == (1, 1)


async def test_second_stream_that_begins_with_the_death_of_the_core_is_passed_on(
    two: RunningCortex, engine: RawEngine, other: RawEngine
) -> None:
    """The request may be what kills them."""
    engine.script = other.script = answering(stream_head(), chunk(DEAD_EVENT) + DONE)
    answer = await ask_stream(two)
    assert (answer.status, answer.body) == (200, DEAD_EVENT + b"data: [DONE]\n\n")
    assert (len(engine.requests), len(other.requests)) == (1, 1)


async def test_error_after_the_head_of_a_stream_ends_it(
    two: RunningCortex, engine: RawEngine, other: RawEngine
) -> None:
    """The engine that continues a stream refuses the request: its error is the last event."""
    engine.script = answering(stream_head(), chunk(DEAD_EVENT) + DONE)
    other.script = answering(plain(b'{"error": {"message": "too long"}}', status="400 Bad Request"))
    answer = await ask_stream(two)
    assert answer.status == 200
    assert b"too long" in answer.body
    assert b"EngineCore" not in answer.body


@pytest.mark.parametrize(
    "body",
    [
        b'data: {"error": {"message": "out of range", "type": "InternalServerError", "code": 500}}\n\n',
        b'data: {"id": "1", "error": null, "choices": [{"delta": {"content": "\\"message\\": \\"EngineCore encountered'
        b' an issue.\\""}}]}\n\n',
        EVENTS + DEAD_EVENT,
        b"",
    ],
)
@pytest.mark.parametrize("apart", [False, True])
async def test_other_beginning_of_a_stream_is_passed_unchanged(
    two: RunningCortex, engine: RawEngine, other: RawEngine, body: bytes, apart: bool
) -> None:
    """Another error, text that only quotes it, an error after the first event, and nothing."""
    pieces = [stream_head(), (chunk(body) if body else b"") + DONE]
    engine.script = answering(*(pieces if apart else [b"".join(pieces)]))
    answer = await ask_stream(two)
    assert answer.body == body + b"data: [DONE]\n\n"
    assert (len(engine.requests), len(other.requests)) == (1, 0)


def in_two(answer: bytes) -> tuple[bytes, bytes]:
    """Head and body, which uvicorn writes one after the other."""
    head, end, body = answer.partition(b"\r\n\r\n")
    return head + end, body


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("answer", [DEAD, DEAD_MESSAGES, STOPPING])
async def test_other_replica_when_the_core_of_the_first_is_dead(
    two: RunningCortex, engine: RawEngine, other: RawEngine, answer: bytes, apart: bool
) -> None:
    """vLLM's server outlives its core for a while, and answers with a 500 that says so."""
    engine.script = answering(*(in_two(answer) if apart else (answer,)))
    await answered_by(two, "benjy")
    assert (len(engine.requests), len(other.requests)) == (1, 1)


async def test_a_request_is_sent_on_from_one_dead_core_only(
    two: RunningCortex, engine: RawEngine, other: RawEngine
) -> None:
    """It may be what kills them. The client gets the second engine's answer unchanged."""
    engine.script = other.script = answering(*in_two(DEAD))
    answer = await ask(two)
    assert (answer.status, answer.get("x-cortex-node")) == (500, "benjy")
    assert DEAD.endswith(answer.body)
    assert (len(engine.requests), len(other.requests)) == (1, 1)


@pytest.mark.parametrize("beast", [V1Neuron], indirect=True)
async def test_only_replica_that_stays_dead(one: RunningCortex, engine: RawEngine) -> None:
    """A neuron that tells nothing by itself is asked, and the engine once more."""
    engine.script = answering(DEAD)
    assert DEAD.endswith((await ask(one)).body)
    assert len(engine.requests) == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"Internal Server Error",
        b'{"error":{"message":"list index out of range","type":"InternalServerError","param":null,"code":500}}',
        b'{"error":{"message":"unknown field \'EngineCore encountered an issue.\'","type":"x","code":500}}',
    ],
)
@pytest.mark.parametrize("apart", [False, True])
async def test_other_500_is_passed_unchanged(
    two: RunningCortex, engine: RawEngine, other: RawEngine, body: bytes, apart: bool
) -> None:
    """The request may be at fault, and another engine would do no better."""
    answer = plain(body, "x-of-the-engine: 1", status="500 Internal Server Error")
    engine.script = answering(*(in_two(answer) if apart and body else (answer,)))
    got = await ask(two)
    assert (got.status, got.body, got.get("x-of-the-engine")) == (500, body, "1")
    assert got.get("content-length") == str(len(body))
    assert (len(engine.requests), len(other.requests)) == (1, 0)
