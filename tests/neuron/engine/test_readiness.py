"""When an engine counts as ready, and how quickly that is detected."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from neuron.engine import readiness
from neuron.engine.readiness import until_ready


class Health:
    """An engine's health, and the times of the health checks."""

    def __init__(self) -> None:
        self.up = False
        self.asked = asyncio.Event()
        self.questions = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.questions += 1
        self.asked.set()
        return web.Response(status=200 if self.up else 503)


async def owned() -> bool:
    return True


async def test_a_hint_ends_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pauses of a minute, the hint triggers a check, and soon another if the first came too early."""
    monkeypatch.setattr(readiness, "FIRST_PAUSE_SECS", 60.0)
    health, hint = Health(), asyncio.Event()
    app = web.Application()
    app.router.add_get("/health", health.answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        url = str(server.make_url("")).rstrip("/")
        ready = asyncio.create_task(
            until_ready(session, url, health_path="/health", api_key="k", model_id="m", owns_port=owned, hint=hint)
        )
        await asyncio.wait_for(health.asked.wait(), 5)
        health.asked.clear()
        hint.set()
        await asyncio.wait_for(health.asked.wait(), 5)
        assert not ready.done()
        health.up = True
        began = time.monotonic()
        await asyncio.wait_for(ready, 5)
        assert time.monotonic() - began < 1
    assert health.questions >= 3


async def test_every_line_since_the_first_hint_ends_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM says that it starts to serve some time before it does, and says more when it does."""
    monkeypatch.setattr(readiness, "FIRST_PAUSE_SECS", 60.0)
    monkeypatch.setattr(readiness, "HINTED_PAUSE_SECS", 60.0)
    health, hint = Health(), asyncio.Event()
    app = web.Application()
    app.router.add_get("/health", health.answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        url = str(server.make_url("")).rstrip("/")
        ready = asyncio.create_task(
            until_ready(session, url, health_path="/health", api_key="k", model_id="m", owns_port=owned, hint=hint)
        )
        for up in (False, False, True):
            await asyncio.wait_for(health.asked.wait(), 5)
            health.asked.clear()
            health.up = up
            hint.set()
        await asyncio.wait_for(ready, 5)


async def test_a_hint_alone_is_not_enough() -> None:
    """An engine that logs that it is up but does not answer is not ready, and is still checked with pauses."""
    health, hint = Health(), asyncio.Event()
    hint.set()
    app = web.Application()
    app.router.add_get("/health", health.answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        url = str(server.make_url("")).rstrip("/")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(
                until_ready(session, url, health_path="/health", api_key="k", model_id="m", owns_port=owned, hint=hint),
                0.5,
            )
    assert 2 <= health.questions <= 14
