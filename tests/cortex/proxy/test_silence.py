"""An event stream is never silent for long, and what follows a sign of life is byte for byte the engine's."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.proxy.test_keep_alive import PING, STREAMED, without_signs
from tests.cortex.raw_engine import RawEngine, Received, Script, plain, stream_head
from tests.cortex.raw_http import RawClient, Wire, bounded, chunked, connected, request, until

MODEL = "org/small"
SECS = 0.3
QUIET = 1.0
"""Several times SECS: long enough for signs of life."""
EVENTS = b'data: {"a": 1}\n\ndata: {"b": 2}\n\ndata: [DONE]\n\n'
END = b"0\r\n\r\n"
JSON_BODY = b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}'
JSON = plain(JSON_BODY)
JSON_ERROR = plain(JSON_BODY, status="400 No")
JSON_CHUNKS = stream_head(content_type="application/json") + chunked(JSON_BODY, 9)


@pytest.fixture
async def engine(benjy: V1Neuron) -> AsyncIterator[RawEngine]:
    async with RawEngine().running() as engine:
        benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
        yield engine


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> RunningCortex:
    return await start_cortex([benjy], [{"id": MODEL}], gateway={"keepalive_secs": SECS})


def asking(target: str = "/v1/chat/completions", *lines: str, stream: bool = True, version: str = "HTTP/1.1") -> bytes:
    body = json.dumps({"model": MODEL, "stream": stream, "n": 1}).encode()
    return request(body, *lines, target=target, version=version)


def paced(*pieces: bytes) -> Script:
    """Sends the pieces with a silence before each but the first."""

    async def script(wire: Wire, received: Received) -> None:
        for number, piece in enumerate(pieces):
            if number:
                await asyncio.sleep(QUIET)
            await wire.send(piece)

    return script


def framed(data: bytes, size: int = 1000) -> bytes:
    return chunked(data, size).removesuffix(END)


async def stream_of(cortex: RunningCortex, data: bytes) -> tuple[bytes, RawClient]:
    """The body of an answer."""
    async with connected(cortex.url) as client:
        answer = await client.ask(data)
        assert answer.status == 200
        assert (answer.get("cache-control"), answer.get("x-accel-buffering")) == ("no-cache", "no")
        if answer.framing == "chunked":
            assert (await client.ask(request(method="GET", target="/health"), "GET")).status == 200
        return answer.body, client


def signs(body: bytes) -> int:
    return sum(line.startswith(b": ") for line in body.split(b"\n"))


@pytest.mark.parametrize("target", STREAMED)
@pytest.mark.parametrize(
    "script",
    [
        paced(b"", stream_head() + chunked(EVENTS, 9)),
        paced(stream_head(), chunked(EVENTS, 9)),
        paced(stream_head() + framed(EVENTS[:16]), chunked(EVENTS[16:], 9)),
        paced(stream_head() + framed(EVENTS[:16], 1), chunked(EVENTS[16:], 1)),
        paced(stream_head() + framed(EVENTS), END),
    ],
    ids=["before-the-head", "before-the-first-event", "in-a-gap", "in-a-gap-of-single-bytes", "before-the-end"],
)
async def test_silent_stream_gets_signs_of_life(
    cortex: RunningCortex, engine: RawEngine, script: Script, target: str
) -> None:
    """Comments arrive while the engine sends nothing, and the engine's events are unchanged."""
    engine.script = script
    began = time.monotonic()
    body, _ = await stream_of(cortex, asking(target))
    assert without_signs(body) == EVENTS
    assert 1 <= signs(body) <= (time.monotonic() - began) / SECS
    assert body.count(PING) == (signs(body) if target == "/v1/messages" else 0)
    assert b"\n\n\n" not in body
    assert b"\n\n: " in body or body.startswith(b": ")


@pytest.mark.parametrize(
    "cut",
    [
        framed(EVENTS[:16]) + b"f\r\n" + EVENTS[16:20],
        framed(EVENTS[:16] + EVENTS[16:20]),
        framed(EVENTS[:15], 1),
        framed(EVENTS[:15], 2),
    ],
    ids=["in-a-chunk", "in-an-event", "in-the-blank-line", "in-the-blank-line-2"],
)
async def test_nothing_is_written_into_an_event(cortex: RunningCortex, engine: RawEngine, cut: bytes) -> None:
    """The last byte did not end an event: the client waits in silence, and gets what the engine sends. (If cortex looks
    for the usage event, the client has no part of an event.)"""
    whole = b'data: {"a": 1}\n\n'
    done = {
        framed(EVENTS[:16]) + b"f\r\n" + EVENTS[16:20]: EVENTS[20:31] + b"\r\n" + chunked(EVENTS[31:], 9),
        framed(EVENTS[:20]): chunked(EVENTS[20:], 9),
    }
    engine.script = paced(stream_head() + cut, done.get(cut, chunked(EVENTS[len(whole) - 1 :], 9)))
    asked = json.dumps({"model": MODEL, "stream": True, "stream_options": {"include_usage": True}}).encode()
    body, _ = await stream_of(cortex, request(asked, target="/v1/chat/completions"))
    assert body == EVENTS


async def test_size_line_that_is_cut_does_not_hinder(cortex: RunningCortex, engine: RawEngine) -> None:
    """cortex holds it back, so the client is between two chunks."""
    rest = chunked(EVENTS[16:], 20)
    engine.script = paced(stream_head() + framed(EVENTS[:16]) + rest[:1], rest[1:])
    body, _ = await stream_of(cortex, asking())
    assert without_signs(body) == EVENTS
    assert signs(body)


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("ends", ["chunks", "close"])
async def test_every_framing(cortex: RunningCortex, engine: RawEngine, version: str, ends: str) -> None:
    """Without chunks, on either side, the signs of life stand between the engine's bytes."""
    head = stream_head()
    pieces = [framed(EVENTS[:16]), chunked(EVENTS[16:], 9)]
    if ends == "close":
        head, pieces = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", [EVENTS[:16], EVENTS[16:]]

    async def script(wire: Wire, received: Received) -> None:
        await paced(head + pieces[0], pieces[1])(wire, received)
        if ends == "close":
            wire.close()

    engine.script = script
    async with connected(cortex.url) as client:
        answer = await client.ask(asking(version=version))
    assert without_signs(answer.body) == EVENTS
    assert signs(answer.body)


async def test_long_prefill_after_a_cold_start(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> None:
    """The progress comments of the load end with the engine's head; the silence after it is broken as well."""
    engine.script = paced(stream_head(), chunked(EVENTS, 9))
    del benjy.models[MODEL]
    benjy.load_gate.clear()
    cortex = await start_cortex(
        [benjy],
        [{"id": MODEL}],
        gateway={"keepalive_secs": SECS},
        waiting={"first_comment_secs": 0.05, "comment_interval_secs": 0.05},
    )
    async with connected(cortex.url) as client:
        await client.send(asking())
        head = await client.head()
        assert (head.get("x-accel-buffering"), head.get("x-cortex-cold-start")) == ("no", "true")
        await bounded(client.incoming.readuntil(b": loading"))
        benjy.load_gate.set()
        await bounded(client.incoming.readuntil(b"is working\n"))
        rest = await bounded(client.incoming.readuntil(END))
    assert b'data: {"a' in rest
    assert b"[DONE]" in rest


async def test_early_answer_tells_its_node(cortex: RunningCortex, engine: RawEngine) -> None:
    """The early head names the node of a loaded model, and the request is not a cold start."""
    engine.script = paced(b"", stream_head() + chunked(EVENTS, 9))
    async with connected(cortex.url) as client:
        await client.send(asking())
        head = await client.head()
    assert (head.get("x-cortex-node"), head.get("x-cortex-cold-start")) == ("benjy", "false")


async def test_plain_request_stays_silent(cortex: RunningCortex, engine: RawEngine) -> None:
    """Its status is not known until the engine answers."""
    engine.script = paced(b"", plain(b'{"ok": 1}', status="418 I'm a teapot"))
    async with connected(cortex.url) as client:
        answer = await client.ask(asking(stream=False))
    assert (answer.status, answer.body) == (418, b'{"ok": 1}')


async def test_error_after_an_early_head_is_the_last_event(cortex: RunningCortex, engine: RawEngine) -> None:
    engine.script = paced(b"", plain(b'{"error": {"message": "no"}}', status="400 No"))
    body, _ = await stream_of(cortex, asking())
    assert without_signs(body) == b'data: {"error": {"message": "no"}}\n\n'


@pytest.mark.parametrize("sent", [EVENTS[:16], EVENTS[:20]], ids=["between-events", "in-an-event"])
async def test_loss_is_an_event_of_its_own(cortex: RunningCortex, engine: RawEngine, sent: bytes) -> None:
    """No empty event before it, which some clients cannot read; an event that was cut off is ended first."""

    async def script(wire: Wire, received: Received) -> None:
        await wire.send(stream_head() + framed(sent))
        await asyncio.sleep(QUIET)
        wire.close()

    engine.script = script
    body, _ = await stream_of(cortex, asking())
    rest = without_signs(body).removeprefix(sent)
    assert rest.startswith(b"data: {" if sent == EVENTS[:16] else b"\n\ndata: {")
    assert b"upstream_lost" in rest


async def test_client_that_does_not_read_gets_no_signs(cortex: RunningCortex, engine: RawEngine) -> None:
    """Signs of life would pile up; what the client reads later is complete."""
    filler = b"data: " + b"x" * 60_000 + b"\n\n"
    engine.script = paced(stream_head() + framed(filler * 100, 60_008), END)
    async with connected(cortex.url, receive_buffer=2048) as client:
        client.stop_reading()
        await client.send(asking())
        await asyncio.sleep(QUIET)
        client.read_on()
        answer = await client.answer()
    assert without_signs(answer.body) == filler * 100


class TestWhitespace:
    """`[waiting] plain_keepalive = "whitespace"`: JSON may begin with white space."""

    @pytest.fixture
    async def cortex(self, start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> RunningCortex:
        return await start_cortex(
            [benjy],
            [{"id": MODEL}],
            gateway={"keepalive_secs": SECS},
            waiting={"first_comment_secs": 0.1, "comment_interval_secs": 0.1, "plain_keepalive": "whitespace"},
        )

    @pytest.mark.parametrize("cold", [False, True])
    @pytest.mark.parametrize("answer", [JSON, JSON_CHUNKS, JSON_ERROR], ids=["length", "chunks", "error"])
    async def test_answer_begins_early(
        self, cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine, cold: bool, answer: bytes
    ) -> None:
        """With `plain_keepalive = "whitespace"` a plain answer's head and line feeds come before the engine answers;
        the body stays valid JSON."""
        engine.script = paced(b"", answer)
        if cold:
            del benjy.models[MODEL]
            await until(lambda: not cortex.parts.fleet.snapshot().serving(MODEL))
            benjy.load_gate.clear()
        async with connected(cortex.url) as client:
            await client.send(asking(stream=False))
            head = await client.head()
            assert head.start == "HTTP/1.1 200 OK"
            assert head.get("content-type") == "application/json"
            await bounded(client.incoming.readuntil(b"1\r\n\n\r\n"))
            benjy.load_gate.set()
            rest = await bounded(client.incoming.readuntil(END))
            got = b"".join(piece for piece in rest.split(b"\r\n")[1::2])
            assert json.loads(got) == json.loads(JSON_BODY)
            assert (await client.ask(request(method="GET", target="/health"), "GET")).status == 200

    async def test_failed_load_is_told_inside_the_200(
        self, cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine
    ) -> None:
        """The head is already sent, so the error is the body."""
        del benjy.models[MODEL]
        await until(lambda: not cortex.parts.fleet.snapshot().serving(MODEL))
        benjy.load_gate.clear()
        benjy.load_error = 500, {"error": {"message": "CUDA out of memory"}}
        async with connected(cortex.url) as client:
            await client.send(asking(stream=False))
            await client.head()
            benjy.load_gate.set()
            rest = await bounded(client.incoming.readuntil(END))
        assert b"CUDA out of memory" in rest

    async def test_stream_still_gets_comments(self, cortex: RunningCortex, engine: RawEngine) -> None:
        """The setting for plain answers does not change streams."""
        engine.script = paced(b"", stream_head() + chunked(EVENTS, 9))
        body, _ = await stream_of(cortex, asking())
        assert without_signs(body) == EVENTS
        assert signs(body)
