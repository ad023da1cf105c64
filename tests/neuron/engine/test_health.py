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
from neuron.engine.health import Vitals
from neuron.harness.vllm.activity import EngineSample, VllmActivity
from tests.neuron.sim_process import FAST, SimProcess, core_of, free_port, ready_engine, until

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30000, "ignore_eos": True}
QUICK = {"interval_secs": 0.1, "unresponsive_secs": 1, "hang_grace_secs": 0.6, "prefill_grace_secs": 2.5}


@contextlib.asynccontextmanager
async def watched(url: str, **settings: float) -> AsyncIterator[Vitals]:
    async with aiohttp.ClientSession() as session:
        limits = HealthSettings(**{**QUICK, **settings})
        yield Vitals(session, url, health_path="/health", probe=VllmActivity(), settings=limits)


async def verdict(engine: SimProcess, *, within_secs: float, **settings: float) -> str:
    async with watched(engine.url, **settings) as vitals:
        return await asyncio.wait_for(vitals.until_bad(), within_secs)


@contextlib.asynccontextmanager
async def asking(engine: SimProcess, **body: object) -> AsyncIterator[None]:
    """A request runs inside the body."""
    async with aiohttp.ClientSession() as session:
        request = asyncio.create_task(session.post(engine.url + "/v1/chat/completions", json={**CHAT, **body}))
        async with watched(engine.url) as vitals:

            async def runs() -> bool:
                sample = await vitals.take_sample()
                return sample is not None and sample.running > 0

            await until(runs)
        try:
            yield
        finally:
            request.cancel()
            await asyncio.wait([request])


async def test_a_working_engine_is_well() -> None:
    """Far past all patience; its figures are known meanwhile."""
    arguments = ("--load-secs", "0", "--ttft-ms", "0", "--tokens-per-sec", "20")
    async with ready_engine(*arguments) as engine, asking(engine), watched(engine.url) as vitals:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(vitals.until_bad(), 2)
        assert vitals.sample is not None
        assert (vitals.sample.running, vitals.sample.waiting) == (1, 0)


async def test_bad_health_is_known_within_two_seconds() -> None:
    """With the times a neuron has when nothing is configured."""
    async with ready_engine(*FAST) as engine:
        engine.send(signal.SIGUSR2)
        started = time.monotonic()
        defaults = HealthSettings().model_dump()
        assert await verdict(engine, within_secs=5, **defaults) == "its health check said 503"
        assert time.monotonic() - started < 2


async def test_an_engine_whose_core_died_is_bad_before_it_ends() -> None:
    async with ready_engine(*FAST) as engine:
        os.kill(core_of(engine.pid), signal.SIGKILL)
        reason = await verdict(engine, within_secs=2)
        assert reason.startswith("its health check ")
        assert await engine.ended() == 0


async def test_nobody_on_the_port_is_bad() -> None:
    async with watched(f"http://127.0.0.1:{free_port()}") as vitals:
        assert "was refused" in await asyncio.wait_for(vitals.until_bad(), 2)


async def test_a_stopped_engine_does_not_answer() -> None:
    """SIGSTOP: connections are taken by the kernel, and nothing comes."""
    async with ready_engine(*FAST) as engine:
        engine.send(signal.SIGSTOP)
        assert await verdict(engine, within_secs=5) == "no answer to its health check for 1 s"


@pytest.mark.parametrize("way", ["SIGUSR1", "core stopped"])
async def test_a_hung_engine_is_found_while_its_health_is_good(way: str) -> None:
    arguments = ("--load-secs", "0", "--ttft-ms", "0", "--tokens-per-sec", "50")
    async with ready_engine(*arguments) as engine, asking(engine):
        if way == "SIGUSR1":
            engine.send(signal.SIGUSR1)
        else:
            os.kill(core_of(engine.pid), signal.SIGSTOP)
        assert (await verdict(engine, within_secs=8)).startswith("hung: 1 requests running")


async def test_a_long_prefill_is_waited_for() -> None:
    """Longer than the patience with a hang: nothing is said, and the answer comes."""
    slow = (*FAST, "--fault", "slow-prefill", "--fault-after", "1.5")
    async with ready_engine(*slow) as engine, asking(engine, max_tokens=5), watched(engine.url) as vitals:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(vitals.until_bad(), 2)
        sample = await vitals.take_sample()
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


async def test_one_bad_answer_is_forgiven() -> None:
    """Every second one is bad, and never two in a row."""
    count = 0

    async def alternating(request: web.Request) -> web.Response:
        nonlocal count
        count += request.path == "/health"
        return web.Response(status=200 if count % 2 else 503)

    async with server(alternating) as url, watched(url, interval_secs=0.02) as vitals:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(vitals.until_bad(), 1)
    assert count > 20


async def test_metrics_that_fail_make_nobody_bad() -> None:
    async def healthy(request: web.Request) -> web.Response:
        return web.Response(status=200 if request.path == "/health" else 500)

    async with server(healthy) as url, watched(url) as vitals:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(vitals.until_bad(), 1)
        assert vitals.sample is None


async def test_our_own_trouble_is_not_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neuron without free file descriptors kills no engine for it."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with watched("http://127.0.0.1:9") as vitals:
        monkeypatch.setattr(vitals._session, "get", fails)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(vitals.until_bad(), 0.5)


def test_the_patience_with_a_prefill_is_the_longer_one() -> None:
    with pytest.raises(ValueError, match="prefill_grace_secs: 5 is less than hang_grace_secs, which is 9"):
        HealthSettings(hang_grace_secs=9, prefill_grace_secs=5)
