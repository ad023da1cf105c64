"""What SIGTERM means for requests that wait for a model, and for health checks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cortex.control.shutdown import Shutdown
from shared.errors import Unavailable
from tests.cortex.conftest import StartCortex
from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, plain
from tests.cortex.raw_http import Wire, bounded, connected, request, until
from tests.processes import alive, descendants

MODEL = "org/small"
ASK = request(json.dumps({"model": MODEL}).encode())


@pytest.fixture(params=[1, 2], ids=["one-worker", "two-workers"])
async def process(request: pytest.FixtureRequest, tmp_path: Path, benjy: V1Neuron) -> AsyncIterator[CortexProcess]:
    """A cortex with a drain timeout longer than any test, and a model that is loaded on request."""
    async with cortex_process(
        tmp_path, [benjy], [{"id": MODEL}], workers=request.param, drain_timeout_secs=3600
    ) as process:
        yield process


@pytest.mark.parametrize("target", ["/v1/completions", "/v1/messages", "/fleet/load"])
async def test_requests_that_wait_for_a_load_are_refused_at_once(
    process: CortexProcess, benjy: V1Neuron, target: str
) -> None:
    """The error has its own code and a Retry-After, early enough to ask another cortex. The neuron continues the load,
    and cortex does not wait for its whole drain time."""
    benjy.load_gate.clear()
    async with connected(process.url) as client:
        await client.send(request(json.dumps({"model": MODEL}).encode(), target=target))
        await bounded(benjy.load_started.wait())
        process.process.send_signal(signal.SIGTERM)
        answer = await client.answer()
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["code"], answer.get("retry-after")) == (503, "cortex_stopping", "5")
    assert answer.get("connection") == "close"
    assert await process.ended(secs=60) == 0
    assert benjy.unloads == []


async def test_stop_while_workers_start(tmp_path: Path) -> None:
    """They need not be up to be told: nothing is waited for, and nothing is left behind."""
    (tmp_path / "cortex.toml").write_text(
        '[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\nworkers = 2\n', encoding="utf-8"
    )
    (tmp_path / "models.toml").write_text("", encoding="utf-8")
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cortex", "serve", "--config", str(tmp_path / "cortex.toml")), stderr=output
        )
    await until(lambda: b"is process" in log.read_bytes())
    pids = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    assert await bounded(process.wait()) == 0
    assert not alive(pids)


async def test_hangup_of_a_closed_terminal_stops(tmp_path: Path) -> None:
    """The kernel sends the very signal that asks for a reload: whose terminal is gone, ends, as always."""
    (tmp_path / "cortex.toml").write_text(
        '[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n', encoding="utf-8"
    )
    (tmp_path / "models.toml").write_text("", encoding="utf-8")
    log = tmp_path / "log"
    ours, theirs = pty.openpty()
    command = ["setsid", "--ctty", sys.executable, "-m", "cortex", "serve", "--config", str(tmp_path / "cortex.toml")]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdin=theirs, stderr=output)
    os.close(theirs)
    await until(lambda: b"cortex listening" in log.read_bytes())
    process.send_signal(signal.SIGHUP)
    await until(lambda: b"configuration reloaded" in log.read_bytes())
    os.close(ours)
    assert await bounded(process.wait()) == 0


async def test_requests_at_an_engine_are_served(process: CortexProcess, benjy: V1Neuron) -> None:
    """A request is served even if its engine has not answered yet; its connection takes no further request."""
    go_on = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        await bounded(go_on.wait())
        await wire.send(plain(b'{"done": true}'))

    async with RawEngine().running() as engine:
        engine.scripts.append(script)
        benjy.models[MODEL] = "loaded"
        benjy.engine_url = engine.url
        async with connected(process.url) as client, contextlib.AsyncExitStack() as stack:
            # So many that each worker has one: it is closed when its worker drains.
            idle = [await stack.enter_async_context(connected(process.url)) for _ in range(12)]
            await client.send(ASK)
            await engine.next_request()
            process.process.send_signal(signal.SIGTERM)
            for waiting in idle:
                assert await waiting.rest() == b""
            await client.send(ASK)
            go_on.set()
            answer = await client.answer()
            assert (answer.status, answer.body, answer.get("connection")) == (200, b'{"done": true}', "close")
            assert await client.rest() == b""
        assert await process.ended() == 0
        assert len(engine.requests) == 1


async def test_no_load_starts_while_stopping(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """A request whose body is complete only now: it gets the same answer, and nothing is begun for it."""
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    cortex.parts.shutdown.begin()
    async with cortex.chat(MODEL) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "cortex_stopping")
    assert benjy.loads == []
    benjy.models[MODEL] = "loaded"
    await cortex.until(lambda: MODEL in cortex.parts.fleet.snapshot().nodes["benjy"].models)
    async with cortex.chat(MODEL) as answer:
        assert answer.status == 200


async def test_health_says_so(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """A load balancer that asks before the listening socket closes sees that cortex is shutdown."""
    cortex = await start_cortex([benjy], [])
    async with cortex.http.get(f"{cortex.url}/health") as answer:
        assert (answer.status, (await answer.json())["status"]) == (200, "ok")
    cortex.parts.shutdown.begin()
    async with cortex.http.get(f"{cortex.url}/health") as answer:
        assert (answer.status, (await answer.json())["status"]) == (503, "degraded")


async def test_a_result_before_the_stop_is_returned() -> None:
    """The call returns the result or raises its error; a stop that begins meanwhile cancels it, as does a caller that
    leaves."""
    shutdown = Shutdown()
    cancelled: list[str] = []

    async def forever(name: str) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(name)
            raise

    async def fails() -> None:
        raise ValueError("its own")

    assert await shutdown.unless_begun(asyncio.sleep(0, "result")) == "result"
    with pytest.raises(ValueError, match="its own"):
        await shutdown.unless_begun(fails())
    evicting = asyncio.create_task(shutdown.unless_begun(forever("left")))
    staying = asyncio.create_task(shutdown.unless_begun(forever("stayed")))
    await asyncio.sleep(0.01)
    evicting.cancel()
    await asyncio.wait([evicting])
    assert evicting.cancelled()
    shutdown.begin()
    with pytest.raises(Unavailable, match="cortex is stopping"):
        await staying
    await asyncio.sleep(0.01)
    assert cancelled == ["left", "stayed"]
    with pytest.raises(Unavailable):
        await shutdown.unless_begun(forever("never begun"))
