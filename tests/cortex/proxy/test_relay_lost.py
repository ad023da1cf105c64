"""An engine lost in the middle of its answer: never a clean end; for an event stream an explicit error."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.cortex.conftest import RunningCortex
from tests.cortex.raw_engine import (
    RawEngine,
    Received,
    Script,
    answering,
    closing,
    echo_number,
    plain,
    resetting,
    stream_head,
)
from tests.cortex.raw_http import Answer, Truncated, Wire, bounded, connected, request

MODEL = "org/small"
ASK = request(b'{"model":"org/small","n":1}')

HEAD = stream_head()
FRAMED = b'10\r\ndata: {"a": 1}\n\n\r\n00B;x=y\r\ndata: {"b":\r\n5\r\n 2}\n\n\r\n0\r\nX-Trailer: 1\r\n\r\n'
"""Two events in three chunks, without a [DONE]: wherever it is cut, an error has to be the last event."""
WHOLE_EVENTS = [b'data: {"a": 1}', b'data: {"b": 2}']


async def ask(cortex: RunningCortex, data: bytes = ASK) -> Answer:
    """The answer to a request on a connection of its own."""
    async with connected(cortex.url) as client:
        return await client.ask(data)


def ends_in_error(answer: Answer, before: str) -> None:
    """Checks that the last event is the error and that those before it are the engine's, of which only the last may be
    cut."""
    events = [event for event in answer.body.split(b"\n\n") if event.strip(b"\n")]
    assert b"[DONE]" not in answer.body
    error = json.loads(events[-1].strip(b"\n").removeprefix(b"data: "))["error"]
    assert (error["code"], error["type"]) == ("upstream_lost", "api_error"), before
    got = [event.strip(b"\n") for event in events[:-1]]
    for event, original in zip(got, WHOLE_EVENTS, strict=False):
        assert original.startswith(event), f"{event!r} when lost after {before}"
    assert all(event == original for event, original in zip(got[:-1], WHOLE_EVENTS, strict=False))


@pytest.mark.parametrize("lost", [closing, resetting])
async def test_event_stream_lost_at_every_byte(
    cortex: RunningCortex, engine: RawEngine, lost: Callable[..., Script]
) -> None:
    """The client can decode the stream to its end wherever it was cut (in a size line, in a payload, before its CRLF,
    before the last chunk, after `0`), and its last event says upstream_lost."""
    for kept in range(1, len(FRAMED)):
        engine.script = lost(HEAD, FRAMED[:kept])
        answer = await ask(cortex)
        assert answer.status == 200
        ends_in_error(answer, repr(FRAMED[:kept][-20:]))


async def test_event_stream_lost_before_its_first_byte(cortex: RunningCortex, engine: RawEngine) -> None:
    """The head alone begins an answer: the client gets a stream of one event, or a 502, and never silence."""
    for script in (closing(HEAD), resetting(HEAD)):
        engine.script = script
        answer = await ask(cortex)
        if answer.status == 200:
            ends_in_error(answer, "the head")
        else:
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (502, "upstream_unreachable")


async def test_head_and_cut_body_in_one_segment(cortex: RunningCortex, engine: RawEngine) -> None:
    """The same when everything, including the end of the connection, comes at once."""

    async def write_and_close(data: bytes) -> None:
        async def script(wire: Wire, received: Received) -> None:
            wire.writer.write(data)
            wire.close()

        engine.script = script
        answer = await ask(cortex)
        if answer.status == 200:
            ends_in_error(answer, repr(data[-20:]))
        else:
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (502, "upstream_unreachable")

    for kept in range(len(FRAMED)):
        await write_and_close(HEAD + FRAMED[:kept])


async def test_error_is_the_last_event_after_a_huge_unfinished_chunk(cortex: RunningCortex, engine: RawEngine) -> None:
    """cortex fills up a chunk that announced a gigabyte, or cuts it visibly; the answer never looks complete."""
    engine.script = closing(HEAD + b"40000000\r\n" + b'data: {"a": 1}\n\ndata: {"b"')
    try:
        answer = await ask(cortex)
    except Truncated:
        return
    ends_in_error(answer, "a huge chunk")


@pytest.mark.parametrize(
    "bad",
    [b"0x5", b"5_0", b"-1", b"+5", b"", b"g", b"5 5", b"fffffffffffffffff", b"1" + b"0" * 16],
)
async def test_bad_chunk_size_is_a_loss(cortex: RunningCortex, engine: RawEngine, bad: bytes) -> None:
    """cortex neither guesses an invalid size nor passes it on, alone or after valid chunks."""
    good = b'10\r\ndata: {"a": 1}\n\n\r\n'
    rest = bad + b"\r\nhello\r\n0\r\n\r\n"
    also, alone = good.replace(b'"a": 1', b'"b": 2'), bad + b"\r\n\r\n"
    for pieces in ((HEAD, good, rest), (HEAD, good + rest), (HEAD, rest), (HEAD, good, also, alone), (HEAD, alone)):
        engine.script = answering(*pieces)
        ends_in_error(await ask(cortex), repr(bad[:20]))
    for wire in engine.connections:
        await bounded(wire.gone.wait())


@pytest.mark.parametrize("rest", [b"5\r\nhelloX\r\n0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n", b"5\nhello\r\n0\r\n\r\n"])
async def test_chunk_without_its_line_end_is_a_loss(cortex: RunningCortex, engine: RawEngine, rest: bytes) -> None:
    """CRLF must follow each size and each chunk; otherwise the start of the next chunk is unknown."""
    engine.script = answering(HEAD, b"2\r\n: \r\n", rest)
    answer = await ask(cortex)
    last = answer.body.strip(b"\n").split(b"\n\n")[-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_lost"
    await bounded(engine.connections[0].gone.wait())


async def never_clean(cortex: RunningCortex, data: bytes, *, may_refuse: bool) -> None:
    """Checks that the client sees an incomplete answer, or an explicit refusal if cortex passed on nothing."""
    try:
        answer = await ask(cortex, data)
    except (Truncated, ConnectionError):
        return
    assert answer.status == 502, f"a clean end: {answer}"
    assert may_refuse
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (502, "upstream_unreachable")


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize(
    ("head", "body"),
    [
        (plain(b'{"half": "whole"}')[:-17], b'{"half": "whole"}'),
        (stream_head(content_type="application/json"), b'9\r\n{"half": \r\n08\r\n"whole"}\r\n0\r\n\r\n'),
        (stream_head("Content-Encoding: gzip"), b"9\r\n123456789\r\n0\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\n", b"data: 1\n\n"),
    ],
    ids=["length", "chunked", "packed-events", "events-of-known-length"],
)
async def test_other_answers_are_cut_when_the_engine_is_lost(
    cortex: RunningCortex, engine: RawEngine, version: str, head: bytes, body: bytes
) -> None:
    """The answer has neither a last chunk nor its full length. An HTTP/1.0 client gets a reset, because a close would
    look like the end."""
    data = request(b'{"model":"org/small"}', version=version)
    for lost in (closing, resetting):
        for kept in range(len(body)):
            engine.script = lost(head, body[:kept]) if kept else lost(head)
            await never_clean(cortex, data, may_refuse=not kept)


async def test_event_stream_lost_for_an_http_1_0_client(cortex: RunningCortex, engine: RawEngine) -> None:
    """It gets the same last event, then the connection closes."""
    for kept in range(1, len(FRAMED)):
        engine.script = closing(HEAD, FRAMED[:kept])
        answer = await ask(cortex, request(b'{"model":"org/small"}', version="HTTP/1.0"))
        assert answer.framing == "close"
        ends_in_error(answer, repr(FRAMED[:kept][-20:]))


async def test_message_stream_lost_in_a_chunk_is_anthropics_error(cortex: RunningCortex, engine: RawEngine) -> None:
    """On /v1/messages the last event is named `error` and has Anthropic's shape."""
    for kept in (2, 20, 30, 46):
        engine.script = closing(HEAD, FRAMED[:kept])
        answer = await ask(cortex, request(b'{"model":"org/small"}', target="/v1/messages"))
        name, data = answer.body.strip(b"\n").split(b"\n\n")[-1].strip(b"\n").split(b"\n")
        assert name == b"event: error"
        assert json.loads(data.removeprefix(b"data: "))["type"] == "error"


async def test_connection_after_an_error_event_is_usable_or_closed(cortex: RunningCortex, engine: RawEngine) -> None:
    """After the error event cortex answers the next request on the connection or closes it; it never hangs."""
    engine.scripts.append(closing(HEAD, FRAMED[:22]))
    engine.script = echo_number
    async with connected(cortex.url) as client:
        ends_in_error(await client.ask(ASK), "22 bytes")
        try:
            answer = await client.ask(ASK)
        except (Truncated, ConnectionError):
            return
        assert (answer.status, json.loads(answer.body)["n"]) == (200, 1)
