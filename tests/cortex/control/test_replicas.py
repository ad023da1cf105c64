"""One model on three neurons behind a real cortex: which neuron gets which request."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron

MODEL = "org/m"
NAMES = ("a", "b", "c")
WORKER_ID = 20
"""So much of a request's id is its worker's."""


class TellingNeuron(V1Neuron):
    """Reports since when its model is loaded, so that cortex caches its endpoint, and what its engine is
    working on: running, waiting."""

    def __init__(self, name: str) -> None:
        super().__init__(name, 24000)
        self.models[MODEL] = "loaded"
        self.activity = (0, 0)

    async def _models(self, request: web.Request) -> web.Response:
        views = [{"id": MODEL, "harness": "vllm", "status": self.models[MODEL], "devices": [0], "since": 1.0}]
        return web.json_response(views)

    async def _health(self, request: web.Request) -> web.Response:
        running, waiting = self.activity
        models = [{"id": MODEL, "in_flight": running, "queue_depth": waiting}]
        return web.json_response({"uptime_secs": 5, "devices": [], "models": models})


@pytest.fixture
async def neurons() -> AsyncIterator[list[TellingNeuron]]:
    async with contextlib.AsyncExitStack() as stack:
        running = [TellingNeuron(name) for name in NAMES]
        for neuron in running:
            await stack.enter_async_context(neuron.running())
        yield running


@pytest.fixture
async def cortex(start_cortex: StartCortex, neurons: list[TellingNeuron]) -> RunningCortex:
    """A cortex that routes to all three."""
    running = await start_cortex(neurons, [{"id": MODEL}])
    await _ask(running, _chat("first"))
    await running.until(lambda: MODEL in running.parts.routes.table)
    return running


def _chat(*contents: str) -> dict[str, Any]:
    """A conversation: the user, the assistant, the user, and so on."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


async def _ask(
    cortex: RunningCortex, body: dict[str, Any], path: str = "/v1/chat/completions", session: str | None = None
) -> str:
    """The node that answered."""
    headers = {} if session is None else {"X-Session-Id": session}
    async with cortex.http.post(f"{cortex.url}{path}", json={"model": MODEL, **body}, headers=headers) as answer:
        await answer.read()
        assert answer.status == 200
        return answer.headers["x-cortex-node"]


async def _embed(cortex: RunningCortex) -> str:
    return await _ask(cortex, {"input": "text"}, "/v1/embeddings")


class Rejection:
    """An engine that keeps requests until it may answer."""

    def __init__(self, neuron: V1Neuron) -> None:
        self.came = asyncio.Event()
        self.go = asyncio.Event()
        self._echo = neuron.engine.echo
        neuron.engine.answer = self._answer

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.came.set()
        await self.go.wait()
        return await self._echo(request)


async def test_conversations_stay_and_prompts_spread(cortex: RunningCortex, neurons: list[TellingNeuron]) -> None:
    """Each turn goes to the engine of the first; another beginning may go elsewhere."""
    nodes = {}
    for number in range(12):
        turns = [f"question {number}", "answer", "next", "answer", "last"]
        nodes[number] = {await _ask(cortex, _chat(*turns[:length])) for length in (1, 3, 5)}
    assert all(len(found) == 1 for found in nodes.values())
    assert set.union(*nodes.values()) == set(NAMES)
    assert all(neuron.engine.requests for neuron in neurons)


async def test_session_header_wins_over_the_prompt(cortex: RunningCortex, neurons: list[TellingNeuron]) -> None:
    """One session with many prompts keeps its engine, many sessions with one prompt spread; the engine sees the header
    too."""
    assert len({await _ask(cortex, _chat(f"question {n}"), session="one") for n in range(9)}) == 1
    assert len({await _ask(cortex, _chat("question"), session=f"{n}") for n in range(12)}) == 3
    assert any(headers.get("X-Session-Id") == "one" for n in neurons for _, headers, _ in n.engine.requests)


async def test_share_of_a_stuck_engine_goes_elsewhere(cortex: RunningCortex, neurons: list[TellingNeuron]) -> None:
    """It gets no more than its bound; all others of the same prompt are answered, by one other engine."""
    home = await _ask(cortex, _chat("question"))
    held = Rejection(next(neuron for neuron in neurons if neuron.name == home))
    stuck = asyncio.create_task(_ask(cortex, _chat("question")))
    await held.came.wait()
    elsewhere = {await _ask(cortex, _chat("question")) for _ in range(6)}
    assert len(elsewhere) == 1
    assert home not in elsewhere
    held.go.set()
    assert await stuck == home
    assert await _ask(cortex, _chat("question")) == home


async def test_requests_without_a_prompt_go_where_least_is_to_be_done(
    cortex: RunningCortex, neurons: list[TellingNeuron]
) -> None:
    """Our own requests count first; among equals the first name wins."""
    held = [Rejection(neuron) for neuron in neurons]
    asking = []
    for engine in held:
        asking.append(asyncio.create_task(_embed(cortex)))
        await engine.came.wait()
    for engine in held:
        engine.go.set()
    assert await asyncio.gather(*asking) == ["a", "b", "c"]


async def test_work_of_others_counts_and_ours_only_once(cortex: RunningCortex, neurons: list[TellingNeuron]) -> None:
    """Reported requests beyond our own count as work of others; those that wait in an engine weigh twice."""
    held = Rejection(neurons[0])
    ours = asyncio.create_task(_embed(cortex))
    await held.came.wait()
    neurons[0].activity = (1, 0)  # ours
    neurons[1].activity = (2, 0)  # another cortex's
    neurons[2].activity = (1, 2)
    table = cortex.parts.routes.table
    await cortex.until(lambda: [replica.others for replica in table[MODEL]] == [0, 2, 5])
    held.came.clear()
    second = asyncio.create_task(_embed(cortex))
    await held.came.wait()
    held.go.set()
    assert set(await asyncio.gather(ours, second)) == {"a"}


async def test_a_faster_engine_is_found_out(cortex: RunningCortex, neurons: list[TellingNeuron]) -> None:
    """After some answers from each replica, idle ones are chosen by speed instead of by name."""
    slow = neurons[0].engine

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        return await slow.echo(request)

    slow.answer = answer
    for _ in range(4):
        await asyncio.gather(*(_embed(cortex) for _ in NAMES))
    assert await _embed(cortex) in ("b", "c")


async def test_a_draining_replica_gets_no_new_request(cortex: RunningCortex) -> None:
    """Prompts that belong to a draining replica go elsewhere too."""
    home = await _ask(cortex, _chat("question"))
    cortex.parts.fleet.set_draining(home, True)
    await cortex.until(lambda: len(cortex.parts.routes.table[MODEL]) == 2)
    assert await _ask(cortex, _chat("question")) != home
    cortex.parts.fleet.set_draining(home, False)
    await cortex.until(lambda: len(cortex.parts.routes.table[MODEL]) == 3)
    assert await _ask(cortex, _chat("question")) == home


@pytest.mark.parametrize("status", ["recovering", "reloading", "sleeping", "failed", "unknown to us"])
async def test_a_replica_that_cannot_serve_gets_no_request(
    cortex: RunningCortex, neurons: list[TellingNeuron], status: str
) -> None:
    """Other figures that its neuron reports do not matter."""
    home = await _ask(cortex, _chat("question"))
    next(neuron for neuron in neurons if neuron.name == home).models[MODEL] = status
    await cortex.until(lambda: len(cortex.parts.routes.table[MODEL]) == 2)
    assert await _ask(cortex, _chat("question")) != home
    assert home not in {await _embed(cortex) for _ in range(3)}


async def test_all_workers_agree(tmp_path: Path, neurons: list[TellingNeuron]) -> None:
    """A prompt has the same engine whichever worker takes the connection."""
    settings = {"load_factor": 100.0}  # many at once, so that both workers get some: no engine counts as too busy
    nodes: dict[int, set[str]] = {}
    async with cortex_process(tmp_path, neurons, [{"id": MODEL}], workers=2, routing=settings) as process:

        async def ask(number: int) -> tuple[int, str, str]:
            body = {"model": MODEL, **_chat(f"question {number}")}
            async with (
                aiohttp.ClientSession() as http,
                http.post(f"{process.url}/v1/chat/completions", data=json.dumps(body).encode()) as answer,
            ):
                await answer.read()
                return number, answer.headers["x-cortex-node"], answer.headers["x-request-id"][:WORKER_ID]

        for _ in range(10):  # the first requests go through the control, which knows no prompts
            nodes = _by_prompt(await _round(ask))
            if all(len(found) == 1 for found in nodes.values()):
                break
    assert all(len(found) == 1 for found in nodes.values()), nodes
    assert set.union(*nodes.values()) == set(NAMES)


def _by_prompt(answers: list[tuple[int, str, str]]) -> dict[int, set[str]]:
    nodes: dict[int, set[str]] = {}
    for number, node, _ in answers:
        nodes.setdefault(number, set()).add(node)
    return nodes


async def _round(ask: Callable[[int], Awaitable[tuple[int, str, str]]]) -> list[tuple[int, str, str]]:
    """Twelve prompts, until both workers have had some of each."""
    answers: list[tuple[int, str, str]] = []
    while len({(number, worker) for number, _, worker in answers}) < 24:
        answers += await asyncio.gather(*(ask(number) for number in range(12) for _ in range(4)))
    return answers
