"""What cortex asks a neuron with events, when, and how it handles invalid answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from cortex.config.neurons import NeuronEntry
from cortex.fleet import neuron_http, poller
from cortex.fleet.neuron_client import NeuronClient
from cortex.fleet.snapshot import NodeSnapshot
from cortex.upstream.pool import EnginePool
from shared.protocol import LoadCommand
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.raw_engine import Received, Script, answering, closing, plain
from tests.cortex.raw_http import Wire, until
from tests.cortex.raw_neuron import RawNeuron

MODEL = "org/model"


@pytest.fixture(autouse=True)
def _no_pause_before_listening_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "EVENTS_RETRY_SECS", 0.01)


@pytest.fixture
async def neuron() -> AsyncIterator[RawNeuron]:
    """A neuron with one loaded model."""
    async with RawNeuron().running() as running:
        running.change(MODEL, "loaded")
        yield running


def entry(neuron: RawNeuron) -> NeuronEntry:
    return NeuronEntry(name=neuron.name, endpoint=neuron.url)


def node(cortex: RunningCortex) -> NodeSnapshot:
    return cortex.parts.fleet.node("raw")


def status(cortex: RunningCortex) -> str | None:
    view = node(cortex).view(MODEL, "")
    return None if view is None else view.status


async def in_step(neuron: RawNeuron, *, polls: int = 1) -> int:
    """Waits until events flow and the poll after their beginning is over; the number of requests until then."""
    await asyncio.wait_for(neuron.streaming.wait(), 10)
    if not polls:
        return len(neuron.asked)
    begun = neuron.asked.index("/events")
    await until(lambda: "/models" in neuron.asked[begun:] and neuron.asked[-1] == "/health")
    return len(neuron.asked)


async def test_polls_request_only_the_health_while_events_arrive(neuron: RawNeuron, start_cortex: StartCortex) -> None:
    """Every fifteenth poll asks for the models as well."""
    await start_cortex([neuron], [])
    begun = await in_step(neuron)
    await until(lambda: len(neuron.asked) >= begun + 2 * poller.FULL_EVERY)
    since = neuron.asked[begun:]
    assert set(since) == {"/health", "/models"}
    assert since.count("/models") in (1, 2)


async def test_polls_request_the_models_without_events(neuron: RawNeuron, start_cortex: StartCortex) -> None:
    """A protocol v1 neuron sends no events, so each poll asks for the models."""
    neuron.scripts["/events"] = answering(plain(b'{"error": "not found"}', status="404 Not Found"))
    await start_cortex([neuron], [])
    await until(lambda: neuron.asked.count("/health") > 5)
    assert neuron.asked.count("/models") >= 5
    assert neuron.asked.count("/discovery") == 1


async def test_an_event_takes_effect_at_once_and_causes_a_poll(neuron: RawNeuron, start_cortex: StartCortex) -> None:
    """The state comes with the event; the memory is measured a moment later, by the neuron, and asked for twice."""
    cortex = await start_cortex([neuron], [], poll={"interval_secs": 0.2})
    begun = await in_step(neuron)
    neuron.change(MODEL, "sleeping")
    await neuron.tell("model", neuron.models[MODEL])
    await until(lambda: status(cortex) == "sleeping")
    neuron.change(MODEL, "sleeping", since=1.0, vram_used_mb=77)
    await until(lambda: neuron.asked[begun:].count("/models") >= poller.MEASURED_POLLS)
    await until(lambda: node(cortex).models[MODEL][""].vram_used_mb == 77)


async def test_a_poll_requests_the_models_after_the_events_break(neuron: RawNeuron, start_cortex: StartCortex) -> None:
    """The next poll picks up changes and removals that happened while events were not received."""
    cortex = await start_cortex([neuron], [])
    await in_step(neuron)
    neuron.scripts["/events"] = closing()
    neuron.change(MODEL, "failed")
    await neuron.end_streams()
    await until(lambda: status(cortex) == "failed")
    assert node(cortex).misses == 0
    del neuron.scripts["/events"], neuron.models[MODEL]
    await until(lambda: status(cortex) is None)
    await asyncio.wait_for(neuron.streaming.wait(), 10)


async def test_a_refresh_requests_the_models(neuron: RawNeuron, start_cortex: StartCortex) -> None:
    """A neuron that has just refused an engine's address: what it says now counts, not the event that comes later."""
    cortex = await start_cortex([neuron], [], poll={"interval_secs": 30})
    await in_step(neuron, polls=0)
    neuron.change(MODEL, "recovering")
    await asyncio.gather(*(cortex.parts.pollers["raw"].refresh() for _ in range(3)))
    assert status(cortex) == "recovering"


async def test_the_health_reveals_a_lost_event(neuron: RawNeuron, start_cortex: StartCortex) -> None:
    """Another engine answers there: the models are asked for in that poll."""
    cortex = await start_cortex([neuron], [])
    begun = await in_step(neuron)
    neuron.change("org/other", "loaded")
    neuron.active = [MODEL, "org/other"]
    await until(lambda: "org/other" in node(cortex).models)
    assert len(neuron.asked) - begun < poller.FULL_EVERY


async def test_a_restarted_neuron_is_polled_in_full(neuron: RawNeuron, start_cortex: StartCortex) -> None:
    """A full poll follows although the event stream of the old process still seems to work."""
    cortex = await start_cortex([neuron], [])
    begun = await in_step(neuron)
    neuron.instance = "two"
    neuron.change(MODEL, "unloaded")
    await until(lambda: node(cortex).instance_id == "two")
    assert status(cortex) == "unloaded"
    assert {"/models", "/discovery"} <= set(neuron.asked[begun:])


async def test_a_lost_device_is_noticed(neuron: RawNeuron, start_cortex: StartCortex) -> None:
    """The health lacks it: cortex asks for the discovery again, once, and does not place models there."""
    neuron.answering_devices = [0, 1]
    cortex = await start_cortex([neuron], [])
    await in_step(neuron)
    for left in ([1], [0, 1]):
        neuron.answering_devices = left
        await until(lambda: [device.index for device in node(cortex).devices] == neuron.answering_devices)
    polls = neuron.asked.count("/health")
    await until(lambda: neuron.asked.count("/health") > polls + 2)
    assert neuron.asked.count("/discovery") == 3


async def test_an_event_during_a_poll_is_not_undone_by_its_older_answer(
    neuron: RawNeuron, start_cortex: StartCortex
) -> None:
    """The list was made before the event and comes after it."""
    cortex = await start_cortex([neuron], [])
    await in_step(neuron)
    asked, gate = asyncio.Event(), asyncio.Event()
    old = plain(neuron.page("/models"))

    async def late(wire: Wire, received: Received) -> None:
        asked.set()
        await gate.wait()
        await wire.send(old)

    neuron.scripts["/models"] = late
    await asyncio.wait_for(asked.wait(), 10)
    neuron.change(MODEL, "failed")
    await neuron.tell("model", neuron.models[MODEL])
    await until(lambda: status(cortex) == "failed")
    polls = neuron.asked.count("/health")
    gate.set()
    del neuron.scripts["/models"]
    await until(lambda: neuron.asked.count("/health") > polls)
    assert status(cortex) == "failed"


async def test_unchanged_answers_change_nothing(neuron: RawNeuron, start_cortex: StartCortex) -> None:
    """A changed uptime wakes no waiter, yet the fleet view shows the current value."""
    cortex = await start_cortex([neuron], [])
    begun = await in_step(neuron)
    version = cortex.parts.fleet.version
    await until(lambda: len(neuron.asked) >= begun + poller.FULL_EVERY + 5)
    assert cortex.parts.fleet.version == version
    first, later = await shown_uptime(cortex), 0.0
    while later <= first:
        later = await shown_uptime(cortex)
    assert cortex.parts.fleet.version == version


async def shown_uptime(cortex: RunningCortex) -> float:
    async with cortex.http.get(f"{cortex.url}/fleet") as response:
        return float((await response.json())["nodes"][0]["uptime_secs"])


async def endless(wire: Wire, received: Received) -> None:
    """Sends a byte now and then, until the client disconnects."""
    await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not wire.gone.is_set():
        await wire.send(b" ")
        await asyncio.sleep(0.02)


async def huge(wire: Wire, received: Received) -> None:
    """Sends more than cortex accepts, without announcing the length."""
    await wire.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while not wire.gone.is_set():
        await wire.send(b" " * 65536)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param(endless, "no answer within 0.3 s", id="slow-drip"),
        pytest.param(huge, "larger than 1 MiB", id="huge"),
        pytest.param(answering(plain(b"<html>")), "not JSON", id="not-json"),
        pytest.param(answering(plain(b"[" * 200_000)), "not JSON", id="deep"),
        pytest.param(answering(plain(b"[]")), "invalid answer of /health", id="not-the-protocol"),
        pytest.param(answering(plain(b"")), "invalid answer of /health", id="empty"),
        pytest.param(answering(plain(b"", "Location: /elsewhere", status="307 X")), "not followed", id="redirect"),
        pytest.param(answering(plain(b'{"error": "tired"}', status="503 X")), "tired", id="refused"),
        pytest.param(closing(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"), "closed", id="cut"),
        pytest.param(closing(b"SSH-2.0-OpenSSH\r\n\r\n"), "invalid HTTP answer", id="not-http"),
    ],
)
async def test_an_invalid_answer_is_a_failed_poll(
    neuron: RawNeuron, start_cortex: StartCortex, monkeypatch: pytest.MonkeyPatch, script: Script, reason: str
) -> None:
    """Three of them make the neuron unhealthy, with the reason; the first good one heals it."""
    monkeypatch.setattr(neuron_http, "MAX_ANSWER_BYTES", 1 << 20)
    cortex = await start_cortex([neuron], [], poll={"timeout_secs": 0.3})
    await in_step(neuron)
    neuron.scripts["/health"] = script
    await until(lambda: not node(cortex).healthy)
    assert reason in (node(cortex).last_error or "")
    assert "/elsewhere" not in neuron.asked
    del neuron.scripts["/health"]
    await until(lambda: node(cortex).healthy)


async def test_a_connection_closed_between_polls_is_not_a_failed_poll(
    neuron: RawNeuron, start_cortex: StartCortex
) -> None:
    """A connection that the neuron closes at the moment of the next poll is not a failure either."""
    closed = 0

    async def once_each(wire: Wire, received: Received) -> None:
        nonlocal closed
        served = sum(request.connection == received.connection for request in neuron.wire.requests)
        if served % 2:
            await wire.send(plain(neuron.page("/health")))
        else:
            closed += 1
            wire.reset()

    cortex = await start_cortex([neuron], [])
    await in_step(neuron)
    with_misses = cortex.parts.fleet.version
    neuron.scripts["/health"] = once_each
    await until(lambda: closed >= 5)
    neuron.scripts["/health"] = closing(plain(neuron.page("/health")))
    polls = len(neuron.asked)
    await until(lambda: len(neuron.asked) > polls + 5)
    assert cortex.parts.fleet.version == with_misses


async def test_polls_keep_their_connection(neuron: RawNeuron, start_cortex: StartCortex) -> None:
    """The polls use one connection, the events another."""
    await start_cortex([neuron], [])
    begun = await in_step(neuron)
    await until(lambda: len(neuron.asked) > begun + 10)
    assert len(neuron.wire.open_connections) == 2
    assert len({request.connection for request in neuron.wire.requests[begun:]}) == 1


async def test_a_load_is_not_sent_on_a_kept_connection(neuron: RawNeuron) -> None:
    """When it breaks, it is unknown whether the neuron got the command: a load might start twice."""
    pool = EnginePool()
    client = NeuronClient(entry(neuron), pool)
    await client.health()
    await client.load(LoadCommand(model_id=MODEL), timeout_secs=5)
    await client.health()
    assert [request.connection for request in neuron.wire.requests] == [0, 1, 1]
    pool.close()


async def test_a_hundred_broken_connections_leave_nothing(neuron: RawNeuron, start_cortex: StartCortex) -> None:
    """Broken polls and streams leak neither descriptors nor tasks."""

    def used() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())  # noqa: PTH208 - only counted

    await start_cortex([neuron], [], poll={"interval_secs": 0.01})
    await in_step(neuron)
    before = used()
    neuron.scripts["/health"] = closing(plain(neuron.page("/health")))
    for _ in range(100):
        await neuron.end_streams()
        await asyncio.wait_for(neuron.streaming.wait(), 10)
    assert len(neuron.wire.connections) > 200
    del neuron.scripts["/health"]
    await until(lambda: used() <= before)


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_polls_are_spread_evenly(count: int) -> None:
    """The longest time without a poll is a small multiple of the mean, whatever the number of neurons."""
    moments = sorted(poller.poll_offset(position, 2.0) for position in range(count))
    gaps = [later - earlier for earlier, later in zip(moments, [*moments[1:], moments[0] + 2.0], strict=True)]
    assert max(gaps) <= 3 * 2.0 / count + 2.0 / poller.POLL_SLOTS
    most = max(moments.count(each) for each in moments)
    assert most <= 2 * count / poller.POLL_SLOTS + 1
