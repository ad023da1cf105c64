"""When cortex may send a request again, and where; it keeps connections to engines, bounds their number and gives them
back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable

import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, Script, closing, echo_number, plain, resetting, stream_head
from tests.cortex.raw_http import Answer, Truncated, Wire, bounded, chunked, connected, request, until

MODEL = "org/small"
IDLE_SECS = 3.0
"""How long cortex may keep an idle connection to an engine."""


async def ask(cortex: RunningCortex, number: int = 1) -> Answer:
    async with connected(cortex.url) as client:
        return await client.ask(request(json.dumps({"model": MODEL, "n": number}).encode()))


async def answered(cortex: RunningCortex, number: int) -> None:
    answer = await ask(cortex, number)
    assert (answer.status, json.loads(answer.body).get("n")) == (200, number), answer.body


async def unreachable(cortex: RunningCortex) -> None:
    answer = await ask(cortex)
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (502, "upstream_unreachable")


def used(engine: RawEngine) -> list[int]:
    """The connection that each request arrived on."""
    return [received.connection for received in engine.requests]


async def test_connection_is_used_again(cortex: RunningCortex, engine: RawEngine) -> None:
    """Consecutive requests of different clients share one connection to the engine."""
    for number in range(10):
        await answered(cortex, number)
    assert used(engine) == [0] * 10


async def test_simultaneous_requests_have_a_connection_each(cortex: RunningCortex, engine: RawEngine) -> None:
    """No request waits for another's answer; later requests reuse the connections."""
    arrived, all_there = [], asyncio.Event()

    async def meet(wire: Wire, received: Received) -> None:
        arrived.append(received)
        if len(arrived) == 5:
            all_there.set()
        await bounded(all_there.wait())
        await echo_number(wire, received)

    engine.script = meet
    await asyncio.gather(*(answered(cortex, number) for number in range(5)))
    assert sorted(used(engine)) == [0, 1, 2, 3, 4]
    engine.script = echo_number
    await answered(cortex, 7)
    assert len(engine.connections) == 5


async def test_idle_connection_that_the_engine_closed_is_not_used(cortex: RunningCortex, engine: RawEngine) -> None:
    """cortex noticed the close: the request takes a new connection and is sent once."""
    for end in (Wire.close, Wire.reset):
        await answered(cortex, 1)
        end(engine.connections[-1])
        await asyncio.sleep(0)
        await answered(cortex, 2)
    assert [len([received for received in engine.requests if b'"n": 2' in received.body])] == [2]


@pytest.mark.parametrize("lost", [closing, resetting])
async def test_stale_connection_is_retried_once_on_a_fresh_one(
    cortex: RunningCortex, engine: RawEngine, lost: Callable[..., Script]
) -> None:
    """The engine closes an old connection just as a request arrives on it: no byte was answered, so cortex sends the
    request again on a new connection, and the client sees one answer."""
    await answered(cortex, 1)
    engine.scripts.append(lost())
    await answered(cortex, 2)
    assert used(engine) == [0, 0, 1]


async def test_stale_connections_are_not_tried_one_after_the_other(cortex: RunningCortex, engine: RawEngine) -> None:
    """With several stale connections in the pool the second attempt uses a new one: at most two arrivals."""
    gate = asyncio.Event()

    async def together(wire: Wire, received: Received) -> None:
        if len(engine.requests) == 3:
            gate.set()
        await bounded(gate.wait())
        await echo_number(wire, received)

    engine.script = together
    await asyncio.gather(*(answered(cortex, number) for number in range(3)))
    stale = list(engine.connections)

    async def close_when_asked(wire: Wire, received: Received) -> None:
        if wire in stale:
            wire.reset()
        else:
            await echo_number(wire, received)

    engine.script = close_when_asked
    await answered(cortex, 9)
    assert [number < 3 for number in used(engine)[3:]] == [True, False]


async def test_request_that_every_connection_loses_arrives_at_most_twice(
    cortex: RunningCortex, engine: RawEngine
) -> None:
    """A stale connection and then a new one, both lost without a byte: 502, no third attempt."""
    await answered(cortex, 1)
    engine.script = resetting()
    await unreachable(cortex)
    assert len(engine.requests) <= 3


@pytest.mark.parametrize("lost", [closing, resetting])
@pytest.mark.parametrize(
    ("kept", "clean_status"),
    [(b"H", 502), (b"HTTP/1.1 200 OK\r\nConte", 502), (plain(b"{}")[:-1], None)],
    ids=["byte", "half-head", "half-body"],
)
async def test_request_is_not_repeated_after_its_answer_has_begun(
    cortex: RunningCortex, engine: RawEngine, lost: Callable[..., Script], kept: bytes, clean_status: int | None
) -> None:
    """This also holds on a reused connection: the engine has already worked on the request."""
    await answered(cortex, 1)
    engine.script = lost(kept)
    try:
        answer = await ask(cortex, 2)
    except (Truncated, ConnectionError):
        assert clean_status is None
    else:
        assert answer.status == clean_status
    assert len(engine.requests) == 2


@contextlib.asynccontextmanager
async def two_replicas(
    start_cortex: StartCortex, first: V1Neuron, second: V1Neuron, engine: RawEngine
) -> AsyncIterator[tuple[RunningCortex, RawEngine]]:
    """A cortex with a model on two neurons; it tries `first`, the first by name, first."""
    async with RawEngine().running() as other:
        for neuron, its in ((first, engine), (second, other)):
            neuron.models[MODEL] = "loaded"
            neuron.engine_url = its.url
        yield await start_cortex([first, second], [{"id": MODEL}]), other


async def test_next_replica_when_a_fresh_connection_is_lost(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron, engine: RawEngine
) -> None:
    """Lost before a byte, the request goes to the other engine only."""
    for lost in (closing(), resetting()):
        async with two_replicas(start_cortex, beast, benjy, engine) as (cortex, other):
            engine.script = lost
            seen = len(engine.requests)
            answer = await ask(cortex, 5)
            assert (answer.status, answer.get("x-cortex-node")) == (200, "benjy")
            assert (len(engine.requests) - seen, len(other.requests)) == (1, 1)


async def test_next_replica_when_the_connection_is_refused(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron, engine: RawEngine
) -> None:
    """Nothing listens at the first engine; a stale connection to it makes no difference."""
    async with contextlib.AsyncExitStack() as life:
        dying = await life.enter_async_context(RawEngine().running())
        async with two_replicas(start_cortex, beast, benjy, dying) as (cortex, other):
            answer = await ask(cortex, 5)
            assert answer.get("x-cortex-node") == "beast"
            await life.aclose()
            answer = await ask(cortex, 6)
            assert (answer.status, answer.get("x-cortex-node")) == (200, "benjy")
            assert len(other.requests) == 1


async def test_begun_answer_is_not_repeated_on_another_replica(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron, engine: RawEngine
) -> None:
    """The client has a part of the answer already."""
    async with two_replicas(start_cortex, beast, benjy, engine) as (cortex, other):
        engine.script = closing(plain(b'{"n": 5}')[:-3])
        with pytest.raises((Truncated, ConnectionError)):
            await ask(cortex, 5)
        assert (len(engine.requests), len(other.requests)) == (1, 0)


async def test_refused_without_another_replica(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """The client gets 502 upstream_unreachable."""
    benjy.engine_url = "http://127.0.0.1:9"
    await unreachable(cortex)


async def test_connection_that_was_idle_for_long_is_not_used_again(cortex: RunningCortex, engine: RawEngine) -> None:
    """vLLM's server closes idle connections after 5 s: cortex stops using them earlier, by closing or by ignoring
    them."""
    await answered(cortex, 1)
    with contextlib.suppress(asyncio.TimeoutError):
        await bounded(engine.connections[0].gone.wait(), secs=IDLE_SECS + 0.5)
    await answered(cortex, 2)
    assert used(engine) == [0, 1]


async def test_nothing_leaks(cortex: RunningCortex, engine: RawEngine) -> None:
    """After answers, losses, refusals, retries and disconnects there are as many descriptors and tasks as before, plus
    at most one idle connection to the engine."""

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only the count matters

    async def leave(body: bytes, script: Script, *, reset: bool) -> None:
        engine.scripts.append(script)
        engine.asked.clear()
        async with connected(cortex.url) as client:
            await client.send(request(body))
            await engine.next_request()
            if reset:
                client.reset()

    async def silence(wire: Wire, received: Received) -> None:
        await wire.gone.wait()

    async def endless(wire: Wire, received: Received) -> None:
        await wire.send(stream_head())
        while True:
            await wire.send(chunked(b"data: 1\n\n" * 1000, 100)[:-5])
            await asyncio.sleep(0)

    await answered(cortex, 0)
    before = descriptors(), len(asyncio.all_tasks())
    body = json.dumps({"model": MODEL}).encode()
    for _ in range(5):
        for script in (closing(), resetting(), resetting(b"HTTP"), closing(plain(b"{}")[:-1])):
            engine.scripts.append(script)
            with contextlib.suppress(Truncated, ConnectionError):
                await ask(cortex)
            engine.scripts.clear()
        for script in (silence, endless):
            await leave(body, script, reset=False)
            await leave(body, script, reset=True)
        async with connected(cortex.url) as client:
            assert (await client.ask(b"GARBAGE\r\n\r\n")).status == 400
    await answered(cortex, 1)
    await until(lambda: len(engine.open_connections) <= 1)
    await until(lambda: (descriptors(), len(asyncio.all_tasks())) <= before)
