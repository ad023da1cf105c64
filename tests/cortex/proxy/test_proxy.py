"""What the proxy passes on, and what happens when either side is lost."""

from __future__ import annotations

import asyncio
import gzip
import json

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron

MODEL = {"id": "org/small"}


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron) -> RunningCortex:
    """A cortex in front of one neuron that has the model loaded."""
    benjy.models["org/small"] = "loaded"
    return await start_cortex([benjy], [MODEL], aliases={"tiny": "org/small"})


async def test_request_passes_byte_for_byte(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """Spacing, key order, number spelling and the query string arrive as they were sent."""
    body = b'{ "temperature": 1.0,"model":"org/small" , "big":12345678901234567890, "u": "\\u00e4\xc3\xa4"}'
    headers = {"Content-Type": "application/json; charset=utf-8", "X-Custom": "1", "Authorization": "Bearer secret"}
    url = URL(f"{cortex.url}/v1/completions?a=b%2Fc", encoded=True)
    async with cortex.http.post(url, data=body, headers=headers) as response:
        assert response.status == 200
    ((path, seen, received),) = benjy.engine.requests
    assert received == body
    assert path == "/v1/completions?a=b%2Fc"
    assert seen["X-Custom"] == "1"
    assert seen["Content-Type"] == headers["Content-Type"]
    assert "Authorization" not in seen, "the client's key for cortex must not reach an engine"


async def test_alias_is_rewritten_and_nothing_else(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """Only the value of the top-level `model` changes."""
    body = b'{"x": {"model": "tiny"}, "s": "\\"model\\": \\"tiny\\" \xc3\xa4",  "model" :"tiny", "t":1e0}'
    async with cortex.http.post(f"{cortex.url}/v1/completions", data=body) as response:
        assert response.status == 200
    assert benjy.engine.requests[0][2] == body.replace(b':"tiny",', b':"org/small",')


async def test_alias_in_a_form_is_rewritten(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """Multipart bodies (audio) are routed by their `model` field; the file passes untouched."""
    audio = bytes(range(256)) * 64

    form = aiohttp.FormData()
    form.add_field("file", audio, filename="model.wav", content_type="audio/wav")
    form.add_field("model", "tiny")
    sent = form()
    assert isinstance(sent, aiohttp.MultipartWriter)
    await cortex.http.post(f"{cortex.url}/v1/audio/transcriptions", data=sent)
    _, headers, body = benjy.engine.requests[0]
    boundary = sent.boundary.encode()
    parts = [part.partition(b"\r\n\r\n") for part in body.split(b"--" + boundary)[1:-1]]
    assert headers["Content-Type"] == sent.content_type
    assert [value.removesuffix(b"\r\n") for _, _, value in parts] == [audio, b"org/small"]


async def test_answer_passes_byte_for_byte(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """Status, headers and body, compressed or not, are the engine's; hop-by-hop headers are dropped."""
    body = gzip.compress(b'{"odd":   1.50}')

    async def answer(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip", "X-Engine": "yes"}
        return web.Response(status=418, body=body, headers={**headers, "Keep-Alive": "timeout=5", "X-Request-Id": "e"})

    benjy.engine.answer = answer
    async with (
        aiohttp.ClientSession(auto_decompress=False) as raw,
        raw.post(f"{cortex.url}/v1/completions", json={"model": "org/small"}, headers={"x-request-id": "mine"}) as got,
    ):
        assert got.status == 418
        assert await got.read() == body
        assert got.headers["X-Engine"] == "yes"
        assert got.headers["Content-Length"] == str(len(body))
        assert got.headers.getall("x-request-id") == ["mine"]
        assert "Keep-Alive" not in got.headers


async def test_chunks_are_passed_on_as_they_come(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """The engine sends its next event only after the client has read the previous one."""
    received = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(3):
            await response.write(f"data: {number}\n\n".encode())
            await received.wait()
            received.clear()
        await response.write(b"data: [DONE]\n\n")
        return response

    benjy.engine.answer = answer
    async with cortex.chat("org/small", stream=True) as response:
        for number in range(3):
            assert await response.content.readuntil(b"\n\n") == f"data: {number}\n\n".encode()
            received.set()
        assert await response.content.read() == b"data: [DONE]\n\n"


async def test_client_that_leaves_ends_the_engines_work(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """A disconnect reaches the engine, both before its answer and in the middle of it."""
    for begun in (False, True):
        benjy.engine.aborted.clear()
        asked = asyncio.Event()

        async def answer(request: web.Request, begun: bool = begun, asked: asyncio.Event = asked) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            if begun:
                await response.prepare(request)
                await response.write(b"data: 1\n\n")
            asked.set()
            await asyncio.Event().wait()
            return response

        benjy.engine.answer = answer
        ask = asyncio.create_task(cortex.chat("org/small").__aenter__())
        await asked.wait()
        if begun:
            (await ask).close()
        else:
            ask.cancel()
        await asyncio.wait_for(benjy.engine.aborted.wait(), 5)
        await asyncio.gather(ask, return_exceptions=True)


async def _cut(request: web.Request, content_type: str, begin: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": content_type})
    await response.prepare(request)
    await response.write(begin)
    assert request.transport is not None
    request.transport.close()
    return response


async def test_engine_lost_in_a_stream_is_an_explicit_error(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """The last event is an error, readable even if the engine's last event was cut; there is no [DONE]."""
    benjy.engine.answer = lambda request: _cut(request, "text/event-stream", b'data: {"a": 1}\n\ndata: {"b"')
    async with cortex.chat("org/small", stream=True) as response:
        text = (await response.read()).decode()
    assert "[DONE]" not in text
    last = text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_lost"


async def test_engine_lost_in_a_message_stream_is_anthropics_error(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """On /v1/messages the event is named and shaped as Anthropic's clients expect."""
    benjy.engine.answer = lambda request: _cut(request, "text/event-stream", b"event: ping\ndata: {}\n\n")
    async with cortex.http.post(f"{cortex.url}/v1/messages", json={"model": "org/small"}) as response:
        name, data = (await response.read()).decode().strip().split("\n\n")[-1].split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["type"] == "error"


async def test_engine_lost_in_a_plain_answer_cuts_the_connection(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """A partial answer never looks complete."""
    benjy.engine.answer = lambda request: _cut(request, "application/json", b'{"half": ')
    with pytest.raises(aiohttp.ClientPayloadError):
        async with cortex.chat("org/small") as response:
            await response.read()


async def test_least_busy_replica_is_taken_and_a_dead_one_is_passed_over(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron
) -> None:
    """Before the first byte a request goes to the next replica; the client sees one answer."""
    for neuron in (beast, benjy):
        neuron.models["org/small"] = "loaded"
    beast.engine_url = "http://127.0.0.1:9"
    cortex = await start_cortex([beast, benjy], [MODEL])
    for _ in range(3):
        async with cortex.chat("org/small") as response:
            assert response.status == 200
            assert response.headers["x-cortex-node"] == "benjy"


async def test_request_that_kills_engines_is_given_up(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """cortex reloads an engine that is lost before its first byte and retries, a limited number of times."""

    async def die(request: web.Request) -> web.StreamResponse:
        benjy.models.clear()
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    benjy.engine.answer = die
    cortex = await start_cortex([benjy], [MODEL])
    async with cortex.chat("org/small") as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_unreachable"
    assert 1 < len(benjy.loads) <= 4


async def test_compressed_request_arrives_decompressed(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """cortex decompresses the body to find the model, and drops Content-Encoding. A damaged body gets a 400."""
    body = b'{"model": "org/small"}'
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    url = f"{cortex.url}/v1/completions"
    async with cortex.http.post(url, data=gzip.compress(body), headers=headers) as response:
        assert response.status == 200
    assert benjy.engine.requests[0][2] == body
    assert "Content-Encoding" not in benjy.engine.requests[0][1]
    async with cortex.http.post(url, data=b"junk", headers=headers) as response:
        assert (await response.json())["error"]["code"] == "invalid_request"
        assert response.status == 400


async def test_engine_lost_in_a_stream_of_known_length_is_a_cut(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """An error event would only fill up the announced length, so cortex cuts the connection at once."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        assert request.transport is not None
        request.transport.close()
        return response

    benjy.engine.answer = answer
    asked = {"include_usage": True}  # otherwise cortex frames the stream itself
    with pytest.raises(aiohttp.ClientPayloadError):
        async with cortex.chat("org/small", stream=True, stream_options=asked) as response:
            await response.read()


async def test_tokens_and_requests_are_counted(cortex: RunningCortex) -> None:
    """/metrics has the contract's names with model and neuron."""
    await _node_of(cortex)
    async with cortex.http.get(f"{cortex.metrics_url}/metrics") as response:
        text = await response.text()
    labels = 'model="org/small",node="benjy"'
    assert f'cortex_requests_total{{{labels},status="200"}} 1.0' in text
    assert f'cortex_tokens_total{{kind="prompt",{labels}}} 3.0' in text
    assert f'cortex_tokens_total{{kind="completion",{labels}}} 5.0' in text
    assert 'cortex_node_healthy{node="benjy"} 1.0' in text
    assert "cortex_time_to_first_byte_seconds_bucket" in text


async def _node_of(cortex: RunningCortex) -> str:
    async with cortex.chat("tiny") as response:
        await response.read()
        assert response.status == 200
        return str(response.headers["x-cortex-node"])
