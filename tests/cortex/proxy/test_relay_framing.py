"""cortex finds the end of an engine's answer wherever the network splits it, and passes on nothing beyond it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.cortex.conftest import RunningCortex
from tests.cortex.raw_engine import RawEngine, Script, answering, closing, echo_number, plain, resetting, stream_head
from tests.cortex.raw_http import (
    RawClient,
    bounded,
    chunked,
    connected,
    every_split,
    request,
    single_bytes,
)

MODEL = "org/small"
ASK = request(b'{"model":"org/small","n":1}')

EVENTS = b'data: {"a": "0\\r\\n\\r\\n"}\n\ndata: 0\r\n\r\n5\r\n\n\ndata: \xc3\xa4\n\ndata: [DONE]\n\n'
"""A payload with the bytes that a careless reader takes for the end, and for a chunk's size."""
FRAMED = (
    b"1A\r\n" + EVENTS[:26] + b"\r\n"
    b"1;ext=1\r\n" + EVENTS[26:27] + b"\r\n"
    b'b;name="quo;ted"\r\n' + EVENTS[27:38] + b"\r\n"
    b"000%x\r\n" % len(EVENTS[38:]) + EVENTS[38:] + b"\r\n"
    b"000;last\r\nX-Trailer: yes\r\nX-More: \r\n\r\n"
)
ODDLY_FRAMED = stream_head("Server: raw") + FRAMED


async def still_usable(client: RawClient) -> None:
    """Checks that the client's connection serves the next request."""
    answer = await client.ask(request(b'{"model":"org/small","n":77}'))
    assert (answer.status, json.loads(answer.body)["n"]) == (200, 77)


async def test_chunked_answer_split_at_every_byte(client: RawClient, engine: RawEngine) -> None:
    """The client gets the payload and its end wherever a segment ends: in sizes, extensions, line ends and trailers."""
    for first, second in every_split(ODDLY_FRAMED):
        engine.script = answering(first, second)
        answer = await client.ask(ASK)
        assert (answer.status, answer.body) == (200, EVENTS), f"split after {first[-20:]!r}"
    engine.script = echo_number
    await still_usable(client)
    assert len(engine.connections) == 1, "a whole answer leaves its connection fit for the next"


async def test_chunked_answer_byte_by_byte(client: RawClient, engine: RawEngine) -> None:
    """Every byte arrives in a segment of its own, the head's included."""
    engine.scripts.append(answering(*single_bytes(ODDLY_FRAMED)))
    answer = await client.ask(ASK)
    assert (answer.status, answer.body) == (200, EVENTS)
    await still_usable(client)


@pytest.mark.parametrize("size", [1, 7, 4096])
async def test_many_chunks_in_a_segment(client: RawClient, engine: RawEngine, size: int) -> None:
    """One read may hold hundreds of chunks, or part of one."""
    payload = EVENTS * 200
    engine.scripts.append(answering(stream_head() + chunked(payload, size)))
    answer = await client.ask(ASK)
    assert answer.body == payload
    await still_usable(client)


@pytest.mark.parametrize("end", [b"0\r\n\r\n", b"000\r\n\r\n", b"0;x\r\n\r\n", b"0\r\nX-T: 1\r\n\r\n"])
async def test_chunk_by_chunk(client: RawClient, engine: RawEngine, end: bytes) -> None:
    """Engines send the head, each chunk and the last chunk in their own segments. The next request finds both
    connections free, so cortex sees the end."""
    pieces = [chunked(b"data: %d\n\n" % number, 64).removesuffix(b"0\r\n\r\n") for number in range(20)]
    for _ in range(3):
        engine.scripts.append(answering(stream_head(), *pieces, end))
        answer = await client.ask(ASK)
        assert answer.body == b"".join(b"data: %d\n\n" % number for number in range(20))
        await still_usable(client)
    assert len(engine.connections) == 1


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
async def test_chunked_answer_for_an_http_1_0_client(cortex: RunningCortex, engine: RawEngine, version: str) -> None:
    """An HTTP/1.0 client gets the payload and a closed connection, however the engine's answer is split."""
    ask = request(b'{"model":"org/small"}', "Connection: close", version=version)
    for first, second in every_split(ODDLY_FRAMED):
        engine.script = answering(first, second)
        async with connected(cortex.url) as client:
            answer = await client.ask(ask)
            assert (answer.status, answer.body) == (200, EVENTS), f"split after {first[-20:]!r}"
            assert answer.framing == ("close" if version == "HTTP/1.0" else "chunked")
            assert await client.rest() == b""


async def test_answer_of_known_length_split_at_every_byte(client: RawClient, engine: RawEngine) -> None:
    """The length determines the end, even if the payload looks like an end or an answer."""
    body = b'{"x": "0\r\n\r\n", "y": "HTTP/1.1 200 OK\r\n\r\n"}'
    for first, second in every_split(plain(body)):
        engine.script = answering(first, second)
        answer = await client.ask(ASK)
        assert (answer.status, answer.body) == (200, body)
    engine.scripts.append(answering(*single_bytes(plain(body))))
    assert (await client.ask(ASK)).body == body
    engine.script = echo_number
    await still_usable(client)
    assert len(engine.connections) == 1


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("pieces", [1, 2, 40])
async def test_answer_that_ends_with_its_connection(
    cortex: RunningCortex, engine: RawEngine, version: str, pieces: int
) -> None:
    """Without length and chunks, the engine's clean close is the end."""
    body = b'{"x": "0\r\n\r\n", "long": "' + b"x" * 40 + b'"}'
    head = f"{version} 200 OK\r\nContent-Type: application/json\r\n\r\n".encode()
    step = -(-len(body) // pieces)
    parts = [body[start : start + step] for start in range(0, len(body), step)]
    engine.script = closing(head + parts[0], *parts[1:])
    for _ in range(2):
        async with connected(cortex.url) as client:
            answer = await client.ask(ASK)
            assert (answer.status, answer.body) == (200, body)
    assert len(engine.connections) == 2


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        (b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\nContent-Length: 10\r\n\r\n', 304),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 200),
        (b"HTTP/1.1 500 \r\nContent-Length: 0\r\n\r\n", 500),
        (b"HTTP/1.1 429\r\nContent-Length: 0\r\nRetry-After: 3\r\n\r\n", 429),
        (b"HTTP/1.1 299 Odd But Fine\r\ncontent-length:0\r\n\r\n", 299),
    ],
)
async def test_answer_without_a_body(client: RawClient, engine: RawEngine, head: bytes, status: int) -> None:
    """The answer ends with its head, and both connections stay usable."""
    for first, second in every_split(head):
        engine.script = answering(first, second)
        answer = await client.ask(ASK)
        assert (answer.status, answer.body) == (status, b"")
    engine.script = echo_number
    await still_usable(client)
    assert len(engine.connections) == 1


async def test_interim_answers_are_skipped(client: RawClient, engine: RawEngine) -> None:
    """100 and 103 are not the answer; the next head is, wherever the network splits it."""
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\nContent-Length: 9\r\n\r\n"
    for first, second in every_split(interim + plain(b"{}")):
        engine.script = answering(first, second)
        answer = await client.ask(ASK)
        assert (answer.status, answer.body) == (200, b"{}")
        assert 100 not in answer.interim, "this client has asked for no 100"
    engine.script = echo_number
    await still_usable(client)


async def test_switching_protocols_is_an_error(client: RawClient, engine: RawEngine) -> None:
    """An unrequested 101 means that the engine does not speak HTTP/1.1."""
    engine.scripts.append(answering(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nxx"))
    await expect_unreachable(client, engine)


POISON = b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"n": "evil"}'


@pytest.mark.parametrize("together", [True, False], ids=["same-segment", "next-segment"])
@pytest.mark.parametrize(
    "whole",
    [plain(b'{"n": 1}'), stream_head() + chunked(b"data: 1\n\n", 4), b"HTTP/1.1 204 No Content\r\n\r\n"],
    ids=["length", "chunked", "no-body"],
)
async def test_bytes_after_an_answer_are_discarded(
    client: RawClient, engine: RawEngine, whole: bytes, together: bool
) -> None:
    """cortex neither passes them on nor reads them as the next answer, and does not reuse their connection."""
    engine.scripts.append(answering(whole + POISON) if together else answering(whole, POISON))
    answer = await client.ask(ASK)
    assert b"evil" not in answer.body
    await bounded(engine.connections[0].gone.wait())
    await still_usable(client)
    assert [received.connection for received in engine.requests] == [0, 1]


async def test_unrequested_answer_is_discarded(client: RawClient, engine: RawEngine) -> None:
    """Servers send 408 on idle connections before they close them; it does not answer any request."""
    await still_usable(client)
    late = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    await engine.connections[0].send_apart([late])
    await bounded(engine.connections[0].gone.wait())
    await still_usable(client)
    assert [received.connection for received in engine.requests] == [0, 1]


async def test_engine_that_closes_after_its_answer(client: RawClient, engine: RawEngine) -> None:
    """After `Connection: close` or HTTP/1.0 cortex does not reuse the engine's connection; the client's stays
    usable."""
    for head in (b"HTTP/1.1 200 OK\r\nConnection: close", b"HTTP/1.0 200 OK"):
        engine.scripts.append(answering(head + b"\r\nContent-Length: 2\r\n\r\n{}"))
        answer = await client.ask(ASK)
        assert (answer.body, answer.get("connection")) == (b"{}", None)
    await still_usable(client)
    assert [received.connection for received in engine.requests] == [0, 1, 2]


LONG = b"X-Pad: " + b"x" * 70_000


@pytest.mark.parametrize(
    "head",
    [
        b"FOO\r\n\r\n",
        b"HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"ICY 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3,3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Null: a\x00b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nBad : name\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + LONG + b"\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + LONG,
    ],
    ids=[
        "no-http",
        "status-no-number",
        "status-too-long",
        "http2",
        "icy",
        "tls",
        "length-and-chunked",
        "two-lengths",
        "length-plus",
        "length-list",
        "length-negative",
        "length-huge",
        "xchunked",
        "chunked-twice",
        "nul-in-value",
        "no-colon",
        "space-before-colon",
        "head-over-64k",
        "head-over-64k-unfinished",
    ],
)
async def test_engine_that_does_not_speak_http(client: RawClient, engine: RawEngine, head: bytes) -> None:
    """502 upstream_unreachable after one attempt; cortex closes the connection and passes on none of its bytes."""
    engine.script = answering(head)
    await expect_unreachable(client, engine)


@pytest.mark.parametrize("lost", [closing, resetting])
@pytest.mark.parametrize("kept", [1, 12, 17, 40])
async def test_engine_lost_in_its_head(
    client: RawClient, engine: RawEngine, lost: Callable[..., Script], kept: int
) -> None:
    """An incomplete head is a 502. The engine had started to answer, so cortex does not retry."""
    engine.script = lost(plain(b"{}")[:kept])
    await expect_unreachable(client, engine)


async def expect_unreachable(client: RawClient, engine: RawEngine) -> None:
    answer = await client.ask(ASK)
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (502, "upstream_unreachable")
    assert len(engine.requests) == 1, "bytes of an answer were seen: the request is not sent again"
    await bounded(engine.connections[0].gone.wait())
    engine.script = echo_number
    await still_usable(client)


async def test_head_request_gets_no_body(client: RawClient) -> None:
    """HEAD gets the headers of GET and no body; the connection stays usable."""
    for _ in range(2):
        answer = await client.ask(request(method="HEAD", target="/health"), method="HEAD")
        assert (answer.status, answer.body) == (200, b"")
    await still_usable(client)
