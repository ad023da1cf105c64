"""`/v1/responses/{id}` goes to the engine that made the response."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from cortex.proxy.body.model_field import previous_response_id
from cortex.routing.response_owners import MAX_IDS, UNSTORED, ResponseMaker, ResponseOwners, response_id
from shared.tasks import timeout
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.cortex.fleets import replica
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, plain, stream_head
from tests.cortex.raw_http import RawClient, Wire, bounded, chunked, connected, request, until

MODEL = "org/small"


class Engine(RawEngine):
    """Makes responses with ids of its own, and answers requests about any id with its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.made = 0
        self.busy = False
        self.go_on = asyncio.Event()
        self.script = self._answer

    async def _answer(self, wire: Wire, received: Received) -> None:
        if received.target != "/v1/responses":
            await wire.send(plain(json.dumps({"engine": self.name, "asked": received.target}).encode()))
            return
        if self.busy:
            await wire.send(plain(b"{}", status="503 Busy"))
            return
        self.made += 1
        made = {"id": f"resp_{self.name}{self.made}", "object": "response", "output": [{"id": "_1"}]}
        if not json.loads(received.body).get("stream"):
            await wire.send(plain(json.dumps(made).encode()))
            return
        event = f"event: response.created\ndata: {json.dumps({'response': made, 'type': 'response.created'})}\n\n"
        await wire.send_apart([stream_head(), chunked(event.encode(), 30).removesuffix(b"0\r\n\r\n")])
        await self.go_on.wait()
        await wire.send(b"0\r\n\r\n")


@pytest.fixture
async def engines(benjy: V1Neuron, beast: V1Neuron) -> AsyncIterator[dict[str, Engine]]:
    async with Engine("benjy").running() as one, Engine("beast").running() as other:
        for neuron, engine in ((benjy, one), (beast, other)):
            neuron.models[MODEL], neuron.engine_url = "loaded", engine.url
        yield {"benjy": one, "beast": other}  # type: ignore[dict-item]


@pytest.fixture
async def cortex(
    start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron, engines: dict[str, Engine]
) -> RunningCortex:
    return await start_cortex([benjy, beast], [{"id": MODEL}], routing={"prefix_chars": 0})


def making(*, stream: bool = False, previous: str | None = None) -> bytes:
    body = {"model": MODEL, "input": "hi", "stream": stream, "previous_response_id": previous}
    return request(json.dumps(body).encode(), target="/v1/responses")


async def ask(client: RawClient, method: str, target: str) -> tuple[int, dict[str, str]]:
    answer = await client.ask(request(method=method, target=target), method)
    return answer.status, json.loads(answer.body)


async def made_on_each(url: str, engines: dict[str, Engine]) -> dict[str, str]:
    """An id of each engine, by the engine's name: the second one gets a request as soon as it is known and its worker
    knows that the first one is busy."""
    made: dict[str, str] = {}
    async with connected(url) as held, connected(url) as client:
        await held.send(making(stream=True))
        await held.head()
        await bounded(held.incoming.readuntil(b"_1"))
        (busy,) = [name for name, engine in engines.items() if engine.made]
        made[busy] = f"resp_{busy}1"
        (free,) = set(engines) - {busy}
        async with timeout(10):
            while free not in made:
                answer = json.loads((await client.ask(making())).body)
                if answer["id"].startswith(f"resp_{free}"):
                    made[free] = answer["id"]
        for engine in engines.values():
            engine.go_on.set()
    return made


async def test_each_request_goes_to_the_engine_that_made_it(cortex: RunningCortex, engines: dict[str, Engine]) -> None:
    made = await made_on_each(cortex.url, engines)
    async with connected(cortex.url) as client:
        for name, made_id in made.items():
            for method, target in (
                ("GET", f"/v1/responses/{made_id}"),
                ("GET", f"/v1/responses/{made_id}?stream=true&starting_after=1"),
                ("POST", f"/v1/responses/{made_id}/cancel"),
                ("DELETE", f"/v1/responses/{made_id}"),
            ):
                assert await ask(client, method, target) == (200, {"engine": name, "asked": target})
                assert engines[name].requests[-1].method == method


async def test_response_can_be_cancelled_while_it_streams(cortex: RunningCortex, engines: dict[str, Engine]) -> None:
    """Its id is known as soon as the client can know it."""
    async with connected(cortex.url) as held, connected(cortex.url) as client:
        await held.send(making(stream=True))
        await held.head()
        await bounded(held.incoming.readuntil(b"_1"))
        (busy,) = [name for name, engine in engines.items() if engine.made]
        status, answer = await ask(client, "POST", f"/v1/responses/resp_{busy}1/cancel")
        assert (status, answer["engine"]) == (200, busy)
        engines[busy].go_on.set()
        await bounded(held.incoming.readuntil(b"0\r\n\r\n"))


async def test_unknown_id(cortex: RunningCortex, engines: dict[str, Engine]) -> None:
    async with connected(cortex.url) as client:
        for method in ("GET", "DELETE"):
            status, answer = await ask(client, method, "/v1/responses/resp_none")
            assert status == 404
            assert "resp_none" in answer["error"]["message"]  # type: ignore[index]
    assert not any(engine.requests for engine in engines.values())


async def test_response_that_no_engine_stores(cortex: RunningCortex, engines: dict[str, Engine]) -> None:
    """The error says so, and that waiting or asking elsewhere is useless."""
    async with connected(cortex.url) as client:
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            status, answer = await ask(client, method, f"/v1/responses/{UNSTORED}0123{path}")
            assert status == 404
            assert "its engine has only /v1/chat/completions" in answer["error"]["message"]  # type: ignore[index]
    assert not any(engine.requests for engine in engines.values())


async def test_engine_that_is_gone(start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron) -> None:
    """Not found, and never another engine's answer."""
    async with Engine("beast").running():
        async with Engine("benjy").running() as engine:
            benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
            cortex = await start_cortex([benjy, beast], [{"id": MODEL}])
            async with connected(cortex.url) as client:
                await client.ask(making())
        async with connected(cortex.url) as client:
            status, _ = await ask(client, "GET", "/v1/responses/resp_benjy1")
            assert status == 404


async def check_each(url: str, made: dict[str, str]) -> None:
    """Asks often enough to reach each worker."""
    for _ in range(8):
        async with connected(url) as client:
            for name, made_id in made.items():
                status, answer = await ask(client, "GET", f"/v1/responses/{made_id}")
                assert (status, answer["engine"]) == (200, name)


async def check_at_both_workers(process: CortexProcess, made: dict[str, str]) -> None:
    """Until each of two workers has answered: then the control knows the responses, too."""
    async with timeout(30):
        while len(workers := set(re.findall(r"GET /v1/responses/.* id=([0-9a-f]{20})", process.log()))) < 2:
            await check_each(process.url, made)
            await asyncio.sleep(0.1)  # they write their lines in batches
    assert len(workers) == 2


async def test_other_workers_know(tmp_path: Path, benjy: V1Neuron, beast: V1Neuron, engines: dict[str, Engine]) -> None:
    """A client's next connection may reach another worker process."""
    async with cortex_process(
        tmp_path, [benjy, beast], [{"id": MODEL}], workers=2, routing={"prefix_chars": 0}
    ) as process:
        made = await made_on_each(process.url, engines)
        await check_each(process.url, made)


@pytest.mark.parametrize("workers", [1, 2])
async def test_known_after_a_restart(
    tmp_path: Path, benjy: V1Neuron, beast: V1Neuron, engines: dict[str, Engine], workers: int
) -> None:
    """The engines still have the responses, also for requests that continue them."""
    start = partial(
        cortex_process,
        tmp_path,
        [benjy, beast],
        [{"id": MODEL}],
        state_dir="state",
        routing={"prefix_chars": 0},
        workers=workers,
    )
    async with start() as process:
        made = await made_on_each(process.url, engines)
        process.process.terminate()
        await process.ended()
    async with start() as process:
        await continue_each(process.url, engines, made, 1)
    async with start() as process, connected(process.url) as client:
        for name, made_id in made.items():
            status, answer = await ask(client, "GET", f"/v1/responses/{made_id}")
            assert (status, answer["engine"]) == (200, name)


async def test_a_new_worker_knows(tmp_path: Path, benjy: V1Neuron, beast: V1Neuron, engines: dict[str, Engine]) -> None:
    """Those of the workers that were killed, too."""
    async with cortex_process(
        tmp_path, [benjy, beast], [{"id": MODEL}], workers=2, routing={"prefix_chars": 0}
    ) as process:
        made = await made_on_each(process.url, engines)
        await check_at_both_workers(process, made)
        for pid in re.findall(r"worker \d is process (\d+)", process.log()):
            os.kill(int(pid), signal.SIGKILL)
        await until(lambda: process.log().count("is process") == 4)
        await check_each(process.url, made)


async def continue_each(url: str, engines: dict[str, Engine], made: dict[str, str], count: int) -> None:
    for _ in range(count):
        async with connected(url) as client:
            for name, made_id in made.items():
                before = engines[name].made
                status = (await client.ask(making(previous=made_id))).status
                assert (status, engines[name].made) == (200, before + 1)


async def test_continuation_goes_to_the_engine(cortex: RunningCortex, engines: dict[str, Engine]) -> None:
    """No other engine has the previous response."""
    await continue_each(cortex.url, engines, await made_on_each(cortex.url, engines), 4)


async def test_continuation_at_another_worker(
    tmp_path: Path, benjy: V1Neuron, beast: V1Neuron, engines: dict[str, Engine]
) -> None:
    async with cortex_process(
        tmp_path, [benjy, beast], [{"id": MODEL}], workers=2, routing={"prefix_chars": 0}
    ) as process:
        await continue_each(process.url, engines, await made_on_each(process.url, engines), 8)


async def test_continuation_of_an_unknown_response(cortex: RunningCortex, engines: dict[str, Engine]) -> None:
    """The engine says what it thinks of it."""
    async with connected(cortex.url) as client:
        assert (await client.ask(making(previous="resp_none"))).status == 200
    assert sum(engine.made for engine in engines.values()) == 1


async def test_continuation_when_the_engine_is_gone(
    start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron
) -> None:
    """Another engine answers."""
    async with Engine("beast").running() as other:
        async with Engine("benjy").running() as engine:
            for neuron, running in ((benjy, engine), (beast, other)):
                neuron.models[MODEL], neuron.engine_url = "loaded", running.url
            cortex = await start_cortex([benjy, beast], [{"id": MODEL}], routing={"prefix_chars": 0})
            engines = {"benjy": engine, "beast": other}
            made = await made_on_each(cortex.url, engines)  # type: ignore[arg-type]
        async with connected(cortex.url) as client:
            assert (await client.ask(making(previous=made["benjy"]))).status == 200


async def test_continuation_at_a_busy_engine(cortex: RunningCortex, engines: dict[str, Engine]) -> None:
    """The client learns that it can retry, not that the response is unknown."""
    made = await made_on_each(cortex.url, engines)
    engines["benjy"].busy = True
    async with connected(cortex.url) as client:
        assert (await client.ask(making(previous=made["benjy"]))).status == 503


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"previous_response_id": "resp_1", "input": []}', "resp_1"),
        (b'{"previous_response_id": "resp_1", "previous_response_id": "resp_2"}', "resp_2"),
        (b'{"temperature": NaN, "previous_response_id": "resp_1"}', "resp_1"),
        (b'{"previous_response_id": null}', None),
        (b'{"previous\\u005fresponse_id": "resp_1"}', "resp_1"),
        (b'{"input": [{"previous_response_id": "resp_1"}]}', None),
        (b'{"input": "\\"previous_response_id\\""}', None),
        (b'{"previous_response_id": "resp_1"', None),
        (b"[]", None),
    ],
)
def test_previous_response_of_a_body(body: bytes, expected: str | None) -> None:
    assert previous_response_id(body) == expected


def test_ids_are_bounded() -> None:
    """The oldest is forgotten first."""
    owners, maker = ResponseOwners(), ResponseMaker(replica(MODEL, "benjy", "http://x"), "")
    for number in range(MAX_IDS + 1):
        owners.add(f"resp_{number}", maker)
    assert owners.find("resp_0") is None
    assert owners.find(f"resp_{MAX_IDS}") is maker


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b'{"id":"resp_1","output":[{"id":"msg"}]}', "resp_1"),
        (b'15\r\nevent: response.created\ndata: {"response": {"id": "resp_2"', "resp_2"),
        (b'{"id":"resp_', None),
        (b'{"id": 5}', None),
        (b"", None),
    ],
)
def test_id_is_found(start: bytes, expected: str | None) -> None:
    assert response_id(start) == expected
