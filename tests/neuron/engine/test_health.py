"""A loaded engine is watched: what makes it bad, how soon that is known, and what does not make it bad."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from neuron.config import HealthSettings
from neuron.engine.health import HealthMonitor
from neuron.harness.vllm.activity import EngineSample, VllmActivity
from tests.neuron.sim_process import FAST, SimProcess, core_of, ready_engine, until
from tests.ports import free_port

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30000, "ignore_eos": True}
QUICK = {"interval_secs": 0.1, "unresponsive_secs": 1, "hang_grace_secs": 0.6, "prefill_grace_secs": 2.5}


@contextlib.asynccontextmanager
async def watched(url: str, **settings: float) -> AsyncIterator[HealthMonitor]:
    async with aiohttp.ClientSession() as session:
        limits = HealthSettings(**{**QUICK, **settings})
        yield HealthMonitor(session, url, health_path="/health", probe=VllmActivity(), settings=limits)


async def reason_of(engine: SimProcess, *, within_secs: float, **settings: float) -> str:
    async with watched(engine.url, **settings) as health:
        return await asyncio.wait_for(health.until_unhealthy(), within_secs)


@contextlib.asynccontextmanager
async def asking(engine: SimProcess, **body: object) -> AsyncIterator[None]:
    """A request runs inside the body."""
    async with aiohttp.ClientSession() as session:
        request = asyncio.create_task(session.post(engine.url + "/v1/chat/completions", json={**CHAT, **body}))
        async with watched(engine.url) as health:

            async def runs() -> bool:
                sample = await health.take_sample()
                return sample is not None and sample.running > 0

            await until(runs)
        try:
            yield
        finally:
            request.cancel()
            await asyncio.wait([request])


async def test_a_working_engine_is_healthy() -> None:
    """The engine stays healthy long after all grace periods, and its activity is known."""
    arguments = ("--load-secs", "0", "--ttft-ms", "0", "--tokens-per-sec", "20")
    async with ready_engine(*arguments) as engine, asking(engine), watched(engine.url) as health:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(health.until_unhealthy(), 2)
        assert health.sample is not None
        assert (health.sample.running, health.sample.waiting) == (1, 0)


async def test_a_failing_check_is_detected_within_two_seconds() -> None:
    """The default settings are enough for this."""
    async with ready_engine(*FAST) as engine:
        engine.send(signal.SIGUSR2)
        started = time.monotonic()
        defaults = HealthSettings().model_dump()
        assert await reason_of(engine, within_secs=5, **defaults) == "its health check answered 503"
        assert time.monotonic() - started < 2


async def test_an_engine_whose_core_died_is_unhealthy_before_it_exits() -> None:
    async with ready_engine(*FAST) as engine:
        os.kill(core_of(engine.pid), signal.SIGKILL)
        reason = await reason_of(engine, within_secs=2)
        assert reason.startswith("its health check ")
        assert await engine.ended() == 0


async def test_a_port_without_listener_is_unhealthy() -> None:
    async with watched(f"http://127.0.0.1:{free_port()}") as health:
        assert "was refused" in await asyncio.wait_for(health.until_unhealthy(), 2)


async def test_a_stopped_engine_does_not_answer() -> None:
    """After SIGSTOP the kernel accepts connections, but nothing answers."""
    async with ready_engine(*FAST) as engine:
        engine.send(signal.SIGSTOP)
        assert await reason_of(engine, within_secs=5) == "no answer to its health check for 1 s"


@pytest.mark.parametrize("way", ["SIGUSR1", "core stopped"])
async def test_a_hung_engine_is_detected_although_its_check_succeeds(way: str) -> None:
    arguments = ("--load-secs", "0", "--ttft-ms", "0", "--tokens-per-sec", "50")
    async with ready_engine(*arguments) as engine, asking(engine):
        if way == "SIGUSR1":
            engine.send(signal.SIGUSR1)
        else:
            os.kill(core_of(engine.pid), signal.SIGSTOP)
        assert (await reason_of(engine, within_secs=8)).startswith("hung: 1 requests running")


async def test_long_prefill_is_not_a_hang() -> None:
    """A prefill longer than `hang_grace_secs` is not reported, and the response arrives."""
    slow = (*FAST, "--fault", "slow-prefill", "--fault-after", "1.5")
    async with ready_engine(*slow) as engine, asking(engine, max_tokens=5), watched(engine.url) as health:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(health.until_unhealthy(), 2)
        sample = await health.take_sample()
        assert isinstance(sample, EngineSample)
        assert sample.completed == 1


@contextlib.asynccontextmanager
async def server(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """Answers everything with `handler`."""
    app = web.Application()
    app.router.add_get("/{any:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_one_failed_check_is_tolerated() -> None:
    """Every second check fails, never two in a row."""
    count = 0

    async def alternating(request: web.Request) -> web.Response:
        nonlocal count
        count += request.path == "/health"
        return web.Response(status=200 if count % 2 else 503)

    async with server(alternating) as url, watched(url, interval_secs=0.02) as health:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(health.until_unhealthy(), 1)
    assert count > 20


async def test_failing_metrics_are_tolerated() -> None:
    async def healthy(request: web.Request) -> web.Response:
        return web.Response(status=200 if request.path == "/health" else 500)

    async with server(healthy) as url, watched(url) as health:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(health.until_unhealthy(), 1)
        assert health.sample is None


async def test_errors_of_neuron_itself_are_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neuron without free file descriptors does not kill the engine."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with watched("http://127.0.0.1:9") as health:
        monkeypatch.setattr(health._session, "get", fails)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(health.until_unhealthy(), 0.5)


def test_prefill_grace_must_be_the_longer_one() -> None:
    with pytest.raises(ValueError, match="prefill_grace_secs: 5 is less than hang_grace_secs, which is 9"):
        HealthSettings(hang_grace_secs=9, prefill_grace_secs=5)
