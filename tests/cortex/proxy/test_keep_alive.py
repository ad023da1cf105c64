"""A stream that waits for its model gets comments; the answer or the error follows them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from cortex.http.connection import ClientConnection
from cortex.proxy.answers.keep_alive import KeepAliveStream
from cortex.routing.replica import WaitNote
from shared.protocol import ModelView, Progress
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Script, answering, closing, plain, stream_head
from tests.cortex.raw_http import RawClient, bounded, chunked, connected, read_body, request, until

MODEL = "org/small"
WAITING = {"first_comment_secs": 0.05, "comment_interval_secs": 0.05}
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
EVENTS = b'data: {"a": 1}\n\ndata: {"usage": {"prompt_tokens": 3, "completion_tokens": 5}}\n\ndata: [DONE]\n\n'
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
STREAM = answering(stream_head() + chunked(EVENTS, 7))


@pytest.fixture
async def engine(benjy: V1Neuron) -> AsyncIterator[RawEngine]:
    """The engine of the model once it is loaded; the load waits for `benjy.load_gate`."""
    async with RawEngine().running() as engine:
        engine.script = STREAM
        benjy.engine_url = engine.url
        benjy.load_gate.clear()
        yield engine


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> RunningCortex:
    return await start_cortex([benjy], [{"id": MODEL}], waiting=WAITING)


def asking(target: str = "/v1/chat/completions", *lines: str, version: str = "HTTP/1.1", stream: Any = True) -> bytes:
    body = {"model": MODEL, "stream": stream}
    return request(json.dumps(body).encode(), *lines, target=target, version=version)


async def chunk(client: RawClient) -> bytes:
    """The next chunk of a body."""
    size = int(await bounded(client.incoming.readuntil(b"\r\n")), 16)
    return (await bounded(client.incoming.readexactly(size + 2)))[:-2]


@contextlib.asynccontextmanager
async def waiting(url: str, target: str = STREAMED[0], *lines: str) -> AsyncIterator[RawClient]:
    """A client that has received the head and two comments of its stream."""
    async with connected(url) as client:
        await client.send(asking(target, *lines))
        assert (await client.head()).start == "HTTP/1.1 200 OK"
        assert (await chunk(client)).startswith(b": ")
        assert (await chunk(client)).startswith(b": ")
        yield client


async def rest(client: RawClient) -> bytes:
    """The rest of the chunked body, after the comments."""
    return without_signs(await read_body(client.incoming, "chunked", 0))


def without_signs(body: bytes) -> bytes:
    """An event stream without comments and pings."""
    return re.sub(rb"(?m)^: [^\n]*\n", b"", body).replace(PING, b"")


async def serves_on(client: RawClient) -> None:
    """Checks that the connection serves the next request."""
    assert (await client.ask(request(method="GET", target="/health"), "GET")).status == 200


async def counted(cortex: RunningCortex, status: int) -> bool:
    """True if the only request was counted with this status."""
    async with cortex.http.get(f"{cortex.metrics_url}/metrics") as response:
        lines = (await response.text()).splitlines()
    (line,) = [line for line in lines if line.startswith("cortex_requests_total{") and f'"{MODEL}"' in line]
    return f'status="{status}"' in line and line.endswith(" 1.0")


@pytest.mark.parametrize("target", STREAMED)
async def test_comments_and_then_the_answer(
    cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine, target: str
) -> None:
    """The client has the head before the model is ready; the engine's bytes follow the comments unchanged, and the
    connection stays usable."""
    async with connected(cortex.url) as client:
        await client.send(asking(target, "x-request-id: mine"))
        head = await client.head()
        assert head.start == "HTTP/1.1 200 OK"
        assert sorted(head.headers) == [
            ("cache-control", "no-cache"),
            ("content-type", "text/event-stream; charset=utf-8"),
            *([("request-id", "mine")] if target == "/v1/messages" else []),
            ("transfer-encoding", "chunked"),
            ("x-accel-buffering", "no"),
            ("x-cortex-cold-start", "true"),
            ("x-cortex-node", "benjy"),
            ("x-request-id", "mine"),
        ]
        for _ in range(3):
            ping = PING if target == "/v1/messages" else b""
            assert await chunk(client) == b": loading org/small on benjy for 0 s\n" + ping
        benjy.load_gate.set()
        assert await rest(client) == EVENTS
        await serves_on(client)
    assert await counted(cortex, 200)
    assert engine.requests[0].get("accept-encoding") == "identity", "a packed answer could not go behind the comments"


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"stream": False}),
        ("/v1/chat/completions", {"stream": "true"}),
        ("/v1/completions", {"n": {"stream": True}}),
        ("/v1/embeddings", {"stream": True}),
    ],
)
async def test_plain_request_is_held_silently(
    cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine, target: str, fields: dict[str, Any]
) -> None:
    """The client gets no byte before the engine's own answer, however long it waits, because the status is still
    open."""
    engine.script = answering(plain(b"{}", status="418 I'm a teapot"))
    body = json.dumps({"model": MODEL, **fields}).encode()
    async with connected(cortex.url) as client, waiting(cortex.url):
        await client.send(request(body, target=target))
        async with waiting(cortex.url):  # as long as another client takes to get two comments
            assert not client.incoming._buffer  # type: ignore[attr-defined]
        benjy.load_gate.set()
        assert (await client.answer()).status == 418


@pytest.mark.parametrize(
    "body", [b'{"model":"org/small","n":NaN,"stream":true}', b'{"stream":false,"stream":true,"model":"org/small"}']
)
async def test_stream_is_detected_as_leniently_as_the_model(
    cortex: RunningCortex, engine: RawEngine, body: bytes
) -> None:
    """cortex reads `stream` as json.loads does; the last of several counts."""
    async with connected(cortex.url) as client:
        await client.send(request(body))
        assert (await client.head()).start == "HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    "script",
    [
        answering(plain(EVENTS, content_type="text/event-stream")),
        answering(plain(EVENTS, content_type="text/event-stream; charset=utf-8")[:-9], EVENTS[-9:]),
        closing(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENTS[:9], EVENTS[9:]),
    ],
    ids=["length", "length, two pieces", "until close"],
)
async def test_every_framing_of_the_engine_becomes_chunks(
    cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine, script: Script
) -> None:
    """The head that the client already has announces chunks."""
    engine.script = script
    async with waiting(cortex.url) as client:
        benjy.load_gate.set()
        assert await rest(client) == EVENTS
        await serves_on(client)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (STREAM, EVENTS),
        (answering(plain(EVENTS, content_type="text/event-stream")), EVENTS),
        (answering(plain(b'{"error":{"code":1}}', status="400 No")), b'data: {"error": {"code": 1}}\n\n'),
    ],
    ids=["chunked", "length", "error"],
)
async def test_http_1_0_until_close(
    cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine, script: Script, expected: bytes
) -> None:
    """No chunks; cortex closes at the end even if the client asked for keep-alive."""
    engine.script = script
    async with connected(cortex.url) as client:
        await client.send(asking("/v1/completions", "Connection: keep-alive", version="HTTP/1.0"))
        head = await client.head()
        assert (head.get("transfer-encoding"), head.get("connection")) == (None, "close")
        assert await bounded(client.incoming.readuntil(b"\n")) == b": loading org/small on benjy for 0 s\n"
        benjy.load_gate.set()
        assert without_signs(await client.rest()) == expected


def error_of(event: bytes, target: str) -> dict[str, Any]:
    """The error in the only event, after checking that it has the dialect's shape."""
    kind = {"/v1/messages": "error", "/v1/responses": "response.failed"}.get(target)
    if kind is not None:
        name, _, event = event.partition(b"\n")
        assert name == f"event: {kind}".encode()
    assert event.startswith(b"data: ")
    assert event.endswith(b"}\n\n")
    body = json.loads(event.removeprefix(b"data: "))
    assert body.get("type") == kind
    found: dict[str, Any] = body["error"]
    if target == "/v1/responses":
        response = body["response"]
        assert (body["sequence_number"], response["status"]) == (0, "failed")
        assert response["error"]["message"] == found["message"]
        assert response["error"]["code"] == ("invalid_prompt" if found.get("code") == 400 else found.get("code"))
    return found


@pytest.mark.parametrize("target", STREAMED)
async def test_failed_load_is_the_last_event(
    cortex: RunningCortex, benjy: V1Neuron, target: str, engine: RawEngine
) -> None:
    """It has the reason and the retry delay. The request counts as a 503, and the connection stays usable."""
    benjy.load_error = 500, {"error": {"message": "CUDA out of memory"}}
    async with waiting(cortex.url, target) as client:
        benjy.load_gate.set()
        error = error_of(await rest(client), target)
        assert (error["code"], error["retry_after"]) == ("cold_load_failed", 10)
        assert error["type"] == ("overloaded_error" if target == "/v1/messages" else "api_error")
        assert "CUDA out of memory" in error["message"]
        await serves_on(client)
    assert await counted(cortex, 503)


@pytest.mark.parametrize("target", STREAMED)
async def test_error_of_the_engine_is_the_last_event(
    cortex: RunningCortex, benjy: V1Neuron, target: str, engine: RawEngine
) -> None:
    """It has the engine's own fields on one line. There is no [DONE]."""
    error = {"message": "too\nlong", "type": "BadRequestError", "param": None, "code": 400}
    engine.script = answering(
        *_halves(plain(json.dumps({"error": error}, indent=1).encode(), status="400 Bad Request"))
    )
    async with waiting(cortex.url, target) as client:
        benjy.load_gate.set()
        expected = {**error, "type": "invalid_request_error"} if target == "/v1/messages" else error
        assert error_of(await rest(client), target) == expected
        await serves_on(client)
    assert await counted(cortex, 400)


def _halves(data: bytes) -> tuple[bytes, bytes]:
    return data[: len(data) // 2], data[len(data) // 2 :]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            answering(plain(b"Internal Server Error", status="500 Oh", content_type="text/plain")),
            (500, "500: Internal Ser"),
        ),
        (answering(plain(b'{"detail": "no such"}', status="404 No")), (404, "404: no such")),
        (answering(plain(b"", status="500 Oh")), (500, "answered 500")),
        (answering(plain(b'{"object": "chat.completion"}')), (502, "200 without an event stream")),
        (answering(plain(EVENTS, "Content-Encoding: br", content_type="text/event-stream")), (502, "without an event")),
        (answering(stream_head(content_type="text/plain") + chunked(b"x" * 100_000, 1000)), (502, "without an event")),
    ],
)
async def test_answer_other_than_a_stream_becomes_an_error(
    cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine, script: Script, expected: tuple[int, str]
) -> None:
    """The stream ends with upstream_error, which quotes the engine."""
    engine.script, (status, message) = script, expected
    async with waiting(cortex.url) as client:
        benjy.load_gate.set()
        error = error_of(await rest(client), STREAMED[0])
        assert error["code"] == "upstream_error"
        assert message in error["message"]
        assert error["type"] == ("api_error" if status >= 500 else "invalid_request_error")
        await serves_on(client)
    assert await counted(cortex, status)


@pytest.mark.parametrize(
    "script",
    [
        closing(stream_head() + b"f\r\ndata: {"),
        closing(plain(EVENTS, content_type="text/event-stream")[:-9]),
        closing(plain(b'{"error": {}}', status="400 No")[:-9]),
    ],
    ids=["chunked", "length", "error"],
)
async def test_engine_lost_behind_the_comments(
    cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine, script: Script
) -> None:
    """An explicit last event and a clean end, as for every stream."""
    engine.script = script
    async with waiting(cortex.url) as client:
        benjy.load_gate.set()
        last = (await rest(client)).strip(b"\n").split(b"\n")[-1]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_lost"


async def test_comments_go_on_until_the_engine_answers(
    cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine
) -> None:
    """A long prompt can take a while too."""
    answered = asyncio.Event()

    async def late(wire: Any, received: Any) -> None:
        await answered.wait()
        await STREAM(wire, received)

    engine.script = late
    async with waiting(cortex.url) as client:
        benjy.load_gate.set()
        while b"request sent to" not in await chunk(client):
            pass
        answered.set()
        assert await rest(client) == EVENTS


async def test_engine_that_answers_503_behind_the_comments(
    cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine
) -> None:
    """cortex asks it once more; then its answer becomes the last event."""
    engine.script = answering(plain(b'{"error": {"message": "full"}}', status="503 Full"))
    async with waiting(cortex.url) as client:
        benjy.load_gate.set()
        assert error_of(await rest(client), STREAMED[0]) == {"message": "full"}
    assert len(engine.requests) == 2
    assert await counted(cortex, 503)


async def test_client_that_disconnects_leaves_the_queue(
    cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine
) -> None:
    """Its task, timer and objects are freed, without the garbage collector. The load continues."""
    async with waiting(cortex.url):
        with_one = len(_waits())
        tasks = len(asyncio.all_tasks())
        async with waiting(cortex.url), waiting(cortex.url) as other:
            assert len(_waits()) == with_one + 2
            other.reset()
        await until(lambda: len(_waits()) == with_one)
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
    await until(lambda: not _waits())
    await until(lambda: len(asyncio.all_tasks()) < tasks)
    benjy.load_gate.set()
    await cortex.until(lambda: "benjy" in {node.name for node in cortex.parts.fleet.snapshot().holders(MODEL)})
    assert not engine.requests


def _waits() -> list[KeepAliveStream]:
    return [found for found in gc.get_objects() if type(found) is KeepAliveStream]


async def test_client_that_does_not_read_is_sent_no_more(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine
) -> None:
    """While its socket is full cortex adds no comments; once it reads again, the answer is complete."""
    cortex = await start_cortex([benjy], [{"id": MODEL}], waiting={**WAITING, "comment_interval_secs": 0.0002})
    async with connected(cortex.url, receive_buffer=2048) as client:
        await client.send(asking())
        await client.head()
        client.stop_reading()
        (connection,) = [c for c in gc.get_objects() if type(c) is ClientConnection and c.working]
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        buffered = connection.transport.get_write_buffer_size
        await until(lambda: buffered() > 0)
        before = buffered()
        await asyncio.sleep(0.2)
        assert buffered() <= before < 200
        benjy.load_gate.set()
        await bounded(engine.asked.wait())
        client.read_on()
        assert await rest(client) == EVENTS


async def test_comment_is_one_line_whatever_a_neuron_says(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine
) -> None:
    """Line ends in a phase do not end the comment."""
    cortex = await start_cortex([benjy], [{"id": MODEL}], waiting=WAITING, poll={"interval_secs": 3600})
    progress = Progress(phase="a\r\ndata: x\n\n", fraction=0.404, remaining_secs=34.2)
    async with waiting(cortex.url) as client:
        cortex.parts.fleet.update_model("benjy", ModelView(id=MODEL, status="loading", progress=progress))
        while (told := await chunk(client)) == b": loading org/small on benjy for 0 s\n":
            pass
        assert told == b": loading org/small on benjy: a data: x 40 %, about 35 s left\n"


async def test_worker_processes_get_notes_from_their_control(
    tmp_path: Path, benjy: V1Neuron, engine: RawEngine
) -> None:
    """Comments say what the control knows, from the first one on with the node. The log has the waiting time."""
    async with cortex_process(
        tmp_path, [benjy], [{"id": MODEL}], workers=2, waiting={"first_comment_secs": 0.4}
    ) as cortex:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connected(cortex.url)) for _ in range(12)]
            for client in clients:
                await client.send(asking())
            for client in clients:
                assert (await client.head()).get("x-cortex-node") == "benjy"
                assert (await chunk(client)).startswith(b": loading org/small on benjy")
            benjy.load_gate.set()
            for client in clients:
                assert await rest(client) == EVENTS
        log = tmp_path / "cortex.log"
        await until(lambda: log.read_text(encoding="utf-8").count(" waited=0.") == 12)


CHAT_CHUNK = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": MODEL} | {
    "choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]
}
RESPONSE_DELTA = {"type": "response.output_text.delta", "delta": "hi", "item_id": "1", "sequence_number": 1} | {
    "output_index": 0,
    "content_index": 0,
    "logprobs": [],
}


@pytest.mark.parametrize("fails", [False, True], ids=["answer", "error"])
@pytest.mark.parametrize("dialect", ["chat", "responses"])
async def test_openai_client(
    cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine, dialect: str, fails: bool
) -> None:
    """The client skips the comments in both OpenAI dialects; an error raises."""
    commented = _commented(cortex)
    event = f"data: {json.dumps(CHAT_CHUNK if dialect == 'chat' else RESPONSE_DELTA)}\n\ndata: [DONE]\n\n"
    engine.script = answering(stream_head() + chunked(event.encode(), 50))
    benjy.load_error = (500, {"error": "no memory"}) if fails else None
    async with openai.AsyncOpenAI(base_url=f"{cortex.url}/v1", api_key="none", max_retries=0) as client:
        asking = asyncio.create_task(_openai_chat(client) if dialect == "chat" else _openai_response(client))
        await bounded(commented.wait())
        benjy.load_gate.set()
        if fails:
            with pytest.raises(openai.APIError, match="no memory"):
                await asking
        else:
            assert await asking == "hi"


async def _openai_chat(client: openai.AsyncOpenAI) -> str:
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True
    )
    return "".join([part.choices[0].delta.content or "" async for part in stream])


async def _openai_response(client: openai.AsyncOpenAI) -> str:
    stream = await client.responses.create(model=MODEL, input="hi", stream=True)
    return "".join([part.delta async for part in stream if part.type == "response.output_text.delta"])


@pytest.mark.parametrize("fails", [False, True], ids=["answer", "error"])
async def test_anthropic_client(cortex: RunningCortex, benjy: V1Neuron, engine: RawEngine, fails: bool) -> None:
    """The client skips the comments; an error raises."""
    commented = _commented(cortex)
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}}
    event = f"event: content_block_delta\ndata: {json.dumps(delta)}\n\n"
    engine.script = answering(stream_head() + chunked(event.encode(), 50))
    benjy.load_error = (500, {"error": "no memory"}) if fails else None
    async with anthropic.AsyncAnthropic(base_url=cortex.url, api_key="none", max_retries=0) as client:

        async def read() -> str:
            stream = await client.messages.create(
                model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "hi"}], stream=True
            )
            return "".join(
                [
                    part.delta.text
                    async for part in stream
                    if part.type == "content_block_delta" and part.delta.type == "text_delta"
                ]
            )

        asking = asyncio.create_task(read())
        await bounded(commented.wait())
        benjy.load_gate.set()
        if fails:
            with pytest.raises(anthropic.APIStatusError, match="no memory"):
                await asking
        else:
            assert await asking == "hi"


def _commented(cortex: RunningCortex) -> asyncio.Event:
    """An event that is set when a client gets a comment."""
    told, router = asyncio.Event(), cortex.parts.resolver
    note = router.note

    def noting(model_id: str) -> WaitNote:
        told.set()
        return note(model_id)

    router.note = noting  # type: ignore[method-assign]
    return told
