"""An engine that lacks `/v1/messages`: noticed before the client hears anything, remembered, and forgotten."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from cortex.routing.missing_paths import KEPT_SECS, MAX_ENTRIES, MissingPaths
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.fleets import replica as made_replica
from tests.cortex.fleets import replica_key
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.proxy.translation.chat_engine import COMPLETION, NOT_FOUND, ChatEngine
from tests.cortex.raw_engine import Received, closing, plain, resetting
from tests.cortex.raw_http import Answer, RawClient, Truncated, Wire, bounded, connected, request, until

MODEL = "org/small"


@pytest.fixture
async def engine(benjy: V1Neuron) -> AsyncIterator[ChatEngine]:
    async with ChatEngine().running() as engine:
        benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
        yield engine  # type: ignore[misc]


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: ChatEngine) -> RunningCortex:
    return await start_cortex([benjy], [{"id": MODEL}])


@asynccontextmanager
async def with_the_path(neuron: V1Neuron) -> AsyncIterator[ChatEngine]:
    """An engine of this neuron that has every path."""
    async with ChatEngine().running() as engine:
        assert isinstance(engine, ChatEngine)
        engine.lacks = set()
        neuron.models[MODEL], neuron.engine_url = "loaded", engine.url
        yield engine


async def ask(client: RawClient, **fields: Any) -> Answer:
    body = {"model": MODEL, "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}], **fields}
    return await client.ask(request(json.dumps(body).encode(), target="/v1/messages?beta=true"))


@pytest.mark.parametrize("missing", NOT_FOUND)
async def test_is_translated_at_once(client: RawClient, engine: ChatEngine, missing: str) -> None:
    """However the engine says that it lacks the path, the client gets an answer, and later requests go straight to
    chat completions."""
    engine.missing = NOT_FOUND[missing]
    for _ in range(2):
        answer = await ask(client)
        assert answer.status == 200, answer.body
        message = json.loads(answer.body)
        assert message["content"] == [{"type": "text", "text": "Hi there"}]
        assert answer.get("x-cortex-node") == "benjy"
        assert answer.get("request-id")
    assert engine.paths == ["/v1/messages", "/v1/chat/completions", "/v1/chat/completions"]


@pytest.mark.parametrize("missing", ["fastapi", "chunked", "until close"])
async def test_stream_is_translated(client: RawClient, engine: ChatEngine, missing: str) -> None:
    engine.missing = NOT_FOUND[missing]
    answer = await ask(client, stream=True)
    assert (answer.status, answer.get("content-type")) == (200, "text/event-stream; charset=utf-8")
    names = [line[7:] for line in answer.body.decode().splitlines() if line.startswith("event: ")]
    assert names == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 2,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
async def test_old_clients(cortex: RunningCortex, engine: ChatEngine, version: str) -> None:
    """A client that does not know chunks gets the stream until the connection closes."""
    body = {"model": MODEL, "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with connected(cortex.url) as client:
        answer = await client.ask(request(json.dumps(body).encode(), target="/v1/messages", version=version))
    assert answer.body.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


@pytest.mark.parametrize(
    "body",
    [
        b'{"error":{"message":"The model `org/small` does not exist.","type":"NotFoundError","param":"model"}}',
        b'{"type":"error","error":{"type":"not_found_error","message":"model \'org/small\' not found"}}',
        b'{"error":{"message":"unknown","code":"model_not_found"}}',
        b'{"error":"model \\"org/small\\" not found, try pulling it first"}',
        b'{"detail":"Unknown model: org/small"}',
        b'{"error":{"message":"Response with id \'resp_1\' not found.","param":"response_id","code":404}}',
        b'{"error":{"message":"Previous response with id \'resp_1\' not found.","type":"invalid_request_error"}}',
        b'{"error":{"message":"No conversation found with id conv_1"}}',
        b'{"error":{"message":"Not here","param":"file_id"}}',
    ],
)
async def test_unknown_thing_is_passed_on(client: RawClient, engine: ChatEngine, body: bytes) -> None:
    """A 404 of an engine that has the path goes to the client byte for byte, with its status."""
    engine.missing = plain(body, status="404 Not Found")
    answer = await ask(client)
    assert (answer.status, answer.body) == (404, body)
    assert engine.paths == ["/v1/messages"]


async def test_long_error_is_passed_on(client: RawClient, engine: ChatEngine) -> None:
    """An error that is too long to be held back reaches the client whole."""
    body = b"x" * 200_000
    engine.missing = plain(body, status="404 Not Found", content_type="text/plain")
    answer = await ask(client)
    assert (answer.status, answer.body) == (404, body)


async def test_engine_with_the_path_gets_bytes_unchanged(client: RawClient, engine: ChatEngine) -> None:
    engine.lacks = set()
    assert (await ask(client)).body == b'{"type": "message", "native": true}'
    assert engine.requests[0].target == "/v1/messages?beta=true"


@pytest.mark.parametrize("missing", NOT_FOUND)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_engine_that_lacks_chats_too_answers_itself(
    cortex: RunningCortex, engine: ChatEngine, missing: str, path: str
) -> None:
    """Such as one for embeddings: the client gets the bytes that it would get without cortex, each time."""
    engine.missing = NOT_FOUND[missing]
    engine.lacks |= {"/v1/chat/completions", "/v1/responses"}
    body = {"model": MODEL, "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}], "input": "hi"}
    asking = request(json.dumps(body).encode(), target=path)
    async with connected(engine.url) as direct:
        expected = await direct.ask(asking)
    for _ in range(2):
        async with connected(cortex.url) as client:
            answer = await client.ask(asking)
        assert (answer.status, answer.body) == (expected.status, expected.body)


async def test_model_that_chats_do_not_know_either_is_not_remembered(client: RawClient, engine: ChatEngine) -> None:
    """The engine says 404 without a reason for an unknown model: its next request tries the client's path again."""
    engine.missing = plain(b"", status="404 Not Found")
    engine.completion = plain(b'{"error": {"message": "no such model"}}', status="404 Not Found")
    answer = await ask(client)
    assert (answer.status, json.loads(answer.body)["error"]["type"]) == (404, "not_found_error")
    engine.lacks = set()
    assert json.loads((await ask(client)).body)["native"]


async def test_forgotten_when_the_engine_fails(client: RawClient, engine: ChatEngine) -> None:
    """An engine that was lost may come back as another program."""
    assert (await ask(client)).status == 200
    engine.lacks = set()
    engine.scripts.append(resetting())  # the kept connection
    engine.scripts.append(closing())
    assert (await ask(client)).status == 502
    assert json.loads((await ask(client)).body)["native"]


async def test_forgotten_when_the_model_is_loaded_again(
    cortex: RunningCortex, client: RawClient, benjy: V1Neuron, engine: ChatEngine
) -> None:
    """The new engine has the path, at the same address."""
    assert (await ask(client)).status == 200
    engine.lacks = set()
    benjy.models[MODEL] = "unloaded"
    await cortex.until(lambda: not cortex.parts.routes.table.get(MODEL))
    answer = await ask(client)
    assert answer.get("x-cortex-cold-start") == "true"
    assert json.loads(answer.body)["native"]


async def test_engine_that_moved_is_found(client: RawClient, benjy: V1Neuron, engine: ChatEngine) -> None:
    """Another server, which knows none of the paths, listens where the engine was: cortex asks the neuron again."""
    assert (await ask(client)).status == 200
    engine.lacks.add("/v1/chat/completions")
    async with ChatEngine().running() as moved:
        assert isinstance(moved, ChatEngine)
        benjy.engine_url = moved.url
        assert json.loads((await ask(client)).body)["content"] == [{"type": "text", "text": "Hi there"}]
        assert moved.paths == ["/v1/messages", "/v1/chat/completions"]


async def test_neuron_says_what_is_missing(start_cortex: StartCortex, benjy: V1Neuron, engine: ChatEngine) -> None:
    """Then the engine is not asked first, however it would answer."""
    engine.lacks = set()
    benjy.entries[MODEL] = {"missing_paths": ["/v1/messages"]}
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    async with connected(cortex.url) as client:
        assert json.loads((await ask(client)).body)["content"] == [{"type": "text", "text": "Hi there"}]
    assert engine.paths == ["/v1/chat/completions"]


async def test_engine_lost_while_it_refuses_is_retried(client: RawClient, engine: ChatEngine) -> None:
    """A 404 that breaks off decides nothing: the client sees it cut off, as any other answer."""
    engine.scripts.append(closing(plain(b'{"detail":"Not Found"}', status="404 Not Found")[:-5]))
    with pytest.raises(Truncated):
        await ask(client)


async def test_replicas_with_and_without_the_path(
    start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron, engine: ChatEngine
) -> None:
    """Each engine is asked in the way that it understands."""
    async with with_the_path(beast) as other:
        cortex = await start_cortex([benjy, beast], [{"id": MODEL}], routing={"prefix_chars": 0})

        async def native() -> bool:
            async with connected(cortex.url) as client:
                return bool(json.loads((await ask(client)).body).get("native", False))

        assert set(await asyncio.gather(*(native() for _ in range(8)))) == {True, False}
        assert set(engine.paths) == {"/v1/messages", "/v1/chat/completions"}
        assert set(other.paths) == {"/v1/messages"}


async def test_places_at_an_engine_with_a_limit(start_cortex: StartCortex, benjy: V1Neuron, engine: ChatEngine) -> None:
    """A request takes one place and gives it back at its end, whether it is translated or refused."""
    benjy.health["models"] = [{"id": MODEL, "in_flight": 0, "queue_depth": 0, "max_in_flight": 2, "max_queue_depth": 8}]
    now = most = 0
    gate = asyncio.Event()
    chats = engine.script

    async def counting(wire: Wire, received: Received) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if "chat" in received.target:
            await gate.wait()
        now -= 1
        await chats(wire, received)

    engine.script = counting
    cortex = await start_cortex([benjy], [{"id": MODEL}])

    async def status(**fields: Any) -> int:
        async with connected(cortex.url) as client:
            return (await ask(client, **fields)).status

    assert await asyncio.gather(*(status(max_tokens=0) for _ in range(5))) == [400] * 5
    asked = [asyncio.create_task(status()) for _ in range(6)]
    await until(lambda: now == 2)
    gate.set()
    assert await bounded(asyncio.gather(*asked)) == [200] * 6
    assert most == 2


async def test_request_that_cannot_be_translated_goes_to_a_replica_with_the_path(
    start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron, engine: ChatEngine
) -> None:
    """Whichever replica is asked first. Without such a replica the client gets the error."""
    async with with_the_path(beast) as other:
        cortex = await start_cortex([benjy, beast], [{"id": MODEL}], routing={"prefix_chars": 0})
        search = {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}

        async def status() -> int:
            async with connected(cortex.url) as client:
                return (await ask(client, **search)).status

        assert await asyncio.gather(*(status() for _ in range(8))) == [200] * 8
        assert set(engine.paths) == {"/v1/messages"}
        assert len(other.paths) == 8
        other.lacks = engine.lacks
        assert await asyncio.gather(*(status() for _ in range(4))) == [400] * 4


async def test_replica_that_fails_is_replaced_by_one_of_the_other_kind(
    start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron, engine: ChatEngine
) -> None:
    """The client's own request follows a translated one, and the other way round."""
    async with with_the_path(beast) as other:
        cortex = await start_cortex([benjy, beast], [{"id": MODEL}], routing={"prefix_chars": 0})
        busy = plain(b"{}", status="503 Service Unavailable")
        native, engine.completion = other.native, busy
        async with connected(cortex.url) as client:
            for _ in range(4):
                assert json.loads((await ask(client)).body)["native"]
            engine.completion, other.native = plain(json.dumps(COMPLETION).encode()), busy
            for _ in range(4):
                assert json.loads((await ask(client)).body)["content"] == [{"type": "text", "text": "Hi there"}]
            other.native = native
        assert all(asked.target == "/v1/messages?beta=true" for asked in other.requests)
        assert all("max_tokens" in json.loads(asked.body) for asked in other.requests)


async def test_request_that_cannot_be_translated_is_refused(client: RawClient, engine: ChatEngine) -> None:
    """The error has Anthropic's shape and names the engine; a native engine would have got the request."""
    answer = await ask(client, tools=[{"type": "web_search_20250305", "name": "web_search"}])
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["type"]) == (400, "invalid_request_error")
    assert "tools[0]" in error["message"]
    assert "org/small on benjy" in error["message"]
    assert engine.paths == ["/v1/messages"]


def test_memory_is_bounded_and_expires() -> None:
    """A minute later the engine is asked again, and another address or key is another engine."""
    paths = MissingPaths()
    replica = made_replica(MODEL, "benjy", "http://benjy:1", api_key="a")
    paths.add(replica, b"/v1/messages", 0.0)
    assert paths.lacks(replica, b"/v1/messages", KEPT_SECS - 1)
    assert not paths.lacks(replica, b"/v1/messages", KEPT_SECS)
    assert not paths.lacks(replica, b"/v1/responses", 1.0)
    for other in (
        replace(replica, api_key="b"),
        replace(replica, key=replica_key("org/other", "benjy")),
        replace(replica, url="http://b:2"),
    ):
        assert not paths.lacks(other, b"/v1/messages", 1.0)
    for number in range(MAX_ENTRIES):
        paths.add(made_replica(MODEL, "benjy", f"http://benjy:{number + 2}"), b"/v1/messages", 0.0)
    assert not paths.lacks(replica, b"/v1/messages", 1.0)
