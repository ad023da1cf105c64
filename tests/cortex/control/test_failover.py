"""An engine that does not serve, before a byte of its answer has reached the client: another one, or the same again."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, answering, echo_number, plain, stream_head
from tests.cortex.raw_http import Answer, Wire, bounded, connected, request, until

MODEL = "org/small"
FULL = plain(b'{"error": {"message": "full"}}', "Retry-After: 7", status="503 Full")
ASLEEP = plain(b"{}", "x-neuron-sleeping: 1", status="503 Service Unavailable")


class TellingNeuron(V1Neuron):
    """A neuron that reports since when its models are loaded: only its endpoints are cached."""

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(
            [{"id": model_id, "status": status, "since": 1} for model_id, status in self.models.items()]
        )


@pytest.fixture(params=[V1Neuron, TellingNeuron])
async def beast(request: pytest.FixtureRequest) -> AsyncIterator[V1Neuron]:
    async with request.param("beast", 32000).running() as neuron:
        yield neuron


@pytest.fixture
async def benjy(beast: V1Neuron) -> AsyncIterator[V1Neuron]:
    """A neuron like beast."""
    async with type(beast)("benjy", 24000).running() as neuron:
        yield neuron


telling = pytest.mark.parametrize("beast", [TellingNeuron], indirect=True)


@pytest.fixture
async def engine() -> AsyncIterator[RawEngine]:
    """The engine on beast, which is asked first."""
    async with RawEngine().running() as engine:
        yield engine


@pytest.fixture
async def other() -> AsyncIterator[RawEngine]:
    """The engine on benjy."""
    async with RawEngine().running() as engine:
        yield engine


@pytest.fixture
async def one(start_cortex: StartCortex, beast: V1Neuron, engine: RawEngine) -> RunningCortex:
    """A cortex with one replica."""
    beast.models[MODEL] = "loaded"
    beast.engine_url = engine.url
    return await start_cortex([beast], [{"id": MODEL}])


@pytest.fixture
async def two(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron, engine: RawEngine, other: RawEngine
) -> RunningCortex:
    """A cortex with two replicas."""
    for neuron, its in ((beast, engine), (benjy, other)):
        neuron.models[MODEL] = "loaded"
        neuron.engine_url = its.url
    return await start_cortex([beast, benjy], [{"id": MODEL}])


async def ask(cortex: RunningCortex, number: int = 1) -> Answer:
    async with connected(cortex.url) as client:
        return await client.ask(request(json.dumps({"model": MODEL, "n": number}).encode()))


async def answered_by(cortex: RunningCortex, node: str) -> None:
    answer = await ask(cortex, 5)
    assert (answer.status, answer.get("x-cortex-node"), json.loads(answer.body).get("n")) == (200, node, 5)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 Service Unavailable"])
async def test_other_replica_when_the_first_answers_502_or_503(
    two: RunningCortex, engine: RawEngine, other: RawEngine, status: str, warm: bool
) -> None:
    """The client sees one answer, whether the table is known already or the control had to be asked."""
    if warm:
        await answered_by(two, "beast")
    engine.script = answering(plain(b"{}", status=status))
    seen = len(engine.requests)
    await answered_by(two, "benjy")
    assert (len(engine.requests) - seen, len(other.requests)) == (1, 1)
    async with two.http.get(f"{two.metrics_url}/metrics") as page:
        assert f'cortex_failovers_total{{kind="status",model="{MODEL}",node="beast"}} 1.0' in await page.text()


@pytest.mark.parametrize("status", ["500 Internal Server Error", "504 Gateway Timeout", "429 Too Many", "400 Bad"])
async def test_other_errors_are_passed_on(two: RunningCortex, engine: RawEngine, other: RawEngine, status: str) -> None:
    """They may be the request's own fault, or follow from work on it."""
    engine.script = answering(plain(b"{}", status=status))
    assert (await ask(two)).start == f"HTTP/1.1 {status}"
    assert (len(engine.requests), len(other.requests)) == (1, 0)


async def test_connection_is_kept_after_a_whole_answer(one: RunningCortex, engine: RawEngine) -> None:
    """A small 503 that arrives whole does not cost the connection."""
    engine.scripts.extend([answering(FULL), echo_number])
    await answered_by(one, "beast")
    assert [received.connection for received in engine.requests] == [0, 0]


async def test_connection_is_closed_where_the_rest_would_have_to_be_waited_for(
    two: RunningCortex, engine: RawEngine
) -> None:
    """A 503 without an end delays nothing and leaks nothing."""

    async def endless(wire: Wire, received: Received) -> None:
        await wire.send(b"HTTP/1.1 503 Full\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await wire.gone.wait()

    engine.script = endless
    await answered_by(two, "benjy")
    await bounded(engine.connections[0].gone.wait())
    assert two.parts.counts.all_in_flight() == {}


async def test_the_only_replica_is_tried_twice(one: RunningCortex, beast: V1Neuron, engine: RawEngine) -> None:
    """Before the second attempt the control asks the neuron, which still reports the model as loaded."""
    await answered_by(one, "beast")
    engine.scripts.append(answering(FULL))
    asked = beast.calls.count("/models")
    await answered_by(one, "beast")
    assert len(engine.requests) == 3
    assert beast.calls.count("/models") > asked


@pytest.mark.parametrize("answer", [FULL, stream_head().replace(b"200 OK", b"502 Bad") + b"2\r\n{}\r\n0\r\n\r\n"])
async def test_second_refusal_is_passed_unchanged(one: RunningCortex, engine: RawEngine, answer: bytes) -> None:
    """The client gets its status, headers and body, and there is no third attempt."""
    engine.script = answering(answer)
    got = await ask(one)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert got.start.encode() == head.split(b"\r\n")[0]
    assert got.body in body
    assert (got.get("retry-after"), got.get("x-cortex-node")) == ("7" if answer == FULL else None, "beast")
    assert len(engine.requests) == 2


async def test_an_unloaded_model_is_loaded_again(one: RunningCortex, beast: V1Neuron, engine: RawEngine) -> None:
    """The 503 came from an engine on its way down: its neuron says so, and the request waits for the reload."""
    await answered_by(one, "beast")

    async def leaves(wire: Wire, received: Received) -> None:
        beast.models[MODEL] = "unloaded"
        await wire.send(FULL)

    engine.scripts.append(leaves)
    answer = await ask(one)
    assert (answer.status, answer.get("x-cortex-cold-start")) == (200, "true")
    assert len(beast.loads) == 1


async def test_sleeping_engine_is_woken(one: RunningCortex, beast: V1Neuron, engine: RawEngine) -> None:
    """The engine fell asleep while the request was on its way."""
    await answered_by(one, "beast")

    async def sleeps(wire: Wire, received: Received) -> None:
        beast.models[MODEL] = "sleeping"
        await wire.send(ASLEEP)

    engine.scripts.append(sleeps)
    answer = await ask(one)
    assert (answer.status, answer.get("x-cortex-cold-start")) == (200, "true")
    assert len(beast.loads) == 1


async def test_engine_that_always_says_that_it_sleeps(one: RunningCortex, engine: RawEngine) -> None:
    """The request's budget ends the attempts, and the engine's answer is passed on."""
    engine.script = answering(ASLEEP)
    answer = await ask(one)
    assert (answer.status, answer.get("x-neuron-sleeping")) == (503, "1")
    assert len(engine.requests) == 3


async def test_budget_of_three_engines(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron, engine: RawEngine, other: RawEngine
) -> None:
    """A request is sent to three of four engines; the client gets the third's answer."""
    async with contextlib.AsyncExitStack() as stack:
        more = [await stack.enter_async_context(type(beast)(name, 24000).running()) for name in ("cat", "dog")]
        engines = [engine, other, *[await stack.enter_async_context(RawEngine().running()) for _ in more]]
        for neuron, its in zip([beast, benjy, *more], engines, strict=True):
            neuron.models[MODEL] = "loaded"
            neuron.engine_url = its.url
            its.script = answering(plain(neuron.name.encode(), status="503 Full"))
        cortex = await start_cortex([beast, benjy, *more], [{"id": MODEL}])
        for _ in range(2):  # the second time, perhaps, by the table
            assert (await ask(cortex)).body == b"cat"
        assert [len(its.requests) for its in engines] == [2, 2, 2, 0]


@contextlib.contextmanager
def full_backlog() -> Iterator[str]:
    """The URL of a socket that listens and takes no further connection: a connect there is not answered."""
    with socket.socket() as listening, contextlib.ExitStack() as stack:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        host, port = listening.getsockname()
        for _ in range(3):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect((host, port))
        yield f"http://{host}:{port}"


@telling
async def test_busy_engine_is_avoided_and_not_forgotten(two: RunningCortex, beast: V1Neuron, other: RawEngine) -> None:
    """A connect that times out sends this one request elsewhere. The endpoint stays: the engine may only be busy."""
    with full_backlog() as url:
        beast.engine_url = url
        await answered_by(two, "benjy")
        assert [replica.url for replica in two.parts.routes.table[MODEL]] == [url, other.url]
        assert beast.calls.count(f"/models/{MODEL}/endpoint") == 1


@telling
async def test_dead_engine_is_forgotten_for_all(two: RunningCortex, beast: V1Neuron, engine: RawEngine) -> None:
    """A refused connection has its endpoint asked for again: the next request finds it at its new port."""
    async with RawEngine().running() as lost:
        beast.engine_url = lost.url
        await answered_by(two, "beast")
    beast.engine_url = engine.url
    await answered_by(two, "benjy")
    await until(lambda: [r.url for r in two.parts.routes.table.get(MODEL, ())][:1] == [engine.url])
    await answered_by(two, "beast")


async def test_error_of_ours_names_the_node_that_failed(one: RunningCortex, beast: V1Neuron) -> None:
    """An error has the node's name only if an engine's failure is the reason."""
    beast.engine_url = "http://127.0.0.1:9"
    answer = await ask(one)
    assert (answer.status, answer.get("x-cortex-node")) == (502, "beast")
    async with connected(one.url) as client:
        answer = await client.ask(request(b'{"model": "none"}'))
    assert (answer.status, answer.get("x-cortex-node")) == (404, None)


@telling
async def test_log_line_tells_attempts(tmp_path: Path, beast: V1Neuron, engine: RawEngine) -> None:
    """The access log has the number of attempts if there was more than one."""
    beast.models[MODEL] = "loaded"
    beast.engine_url = engine.url
    ask = request(b'{"model": "org/small"}')
    async with cortex_process(tmp_path, [beast], [{"id": MODEL}]) as cortex, connected(cortex.url) as client:
        await client.ask(ask)
        await client.ask(ask)
        engine.scripts.append(answering(FULL))
        await client.ask(ask)

        def lines() -> list[str]:
            return [line for line in (tmp_path / "cortex.log").read_text("utf-8").splitlines() if "POST /v1" in line]

        await until(lambda: len(lines()) == 3)
        assert [re.findall(r" (attempts=\d+)", line) for line in lines()] == [[], [], ["attempts=2"]]
        assert " waited=" not in lines()[1]
