"""When an engine counts as ready, and how quickly that is detected."""

from __future__ import annotations

import asyncio
import socket
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
    """Once the pauses are long, the hint triggers a check, and soon another if the first came too early."""
    monkeypatch.setattr(readiness, "HEALTH_PAUSE_SECS", (0.02, 60.0))
    monkeypatch.setattr(readiness, "_GROWTH", 1000.0)
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
        await asyncio.wait_for(ready, 5)
    assert health.questions >= 3


async def test_every_line_since_the_first_hint_ends_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM says that it starts to serve some time before it does, and says more when it does."""
    monkeypatch.setattr(readiness, "HEALTH_PAUSE_SECS", (60.0, 60.0))
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


async def test_an_engine_that_says_nothing_is_found_by_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first health check follows the opening of the port, not a pause between checks; before that nothing is
    sent."""
    monkeypatch.setattr(readiness, "HEALTH_PAUSE_SECS", (60.0, 60.0))
    health = Health()
    health.up = True
    app = web.Application()
    app.router.add_get("/health", health.answer)
    with socket.socket() as reserved:  # bound but not listening: connections are refused
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{port}"
            ready = asyncio.create_task(
                until_ready(session, url, health_path="/health", api_key="k", model_id="m", owns_port=owned)
            )
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(ready), 0.3)
            async with TestServer(app, port=port, socket_factory=shared_port):
                await asyncio.wait_for(ready, 5)
    assert health.questions == 1


async def test_waiting_for_a_port_costs_little() -> None:
    """An engine that loads for long is not tried all the time."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        async with aiohttp.ClientSession() as session:
            ready = asyncio.create_task(
                until_ready(session, url, health_path="/health", api_key="k", model_id="m", owns_port=owned)
            )
            began = time.process_time()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(ready, 2)
            assert time.process_time() - began < 0.1


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
async def test_every_kind_of_address_is_tried(host: str) -> None:
    """The host of the URL is an address of either family, or a name."""
    health = Health()
    health.up = True
    app = web.Application()
    app.router.add_get("/health", health.answer)
    async with TestServer(app, host=host.strip("[]")) as server, aiohttp.ClientSession() as session:
        url = f"http://{host}:{server.port}"
        ready = until_ready(session, url, health_path="/health", api_key="k", model_id="m", owns_port=owned)
        await asyncio.wait_for(ready, 5)


def shared_port(host: str, port: int, family: socket.AddressFamily) -> socket.socket:
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    return sock


@pytest.mark.parametrize(
    ("owns_port", "listed", "ready"),
    [(True, "other", True), (None, "m", True), (None, "other", False), (False, "m", False)],
)
async def test_an_engine_without_a_key_is_recognised(owns_port: bool | None, listed: str, ready: bool) -> None:
    """By its port, or, where neuron cannot see who listens there (an engine in a container), by the model it lists."""

    async def healthy(request: web.Request) -> web.Response:
        return web.Response()

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": listed}]})

    async def owner() -> bool | None:
        return owns_port

    app = web.Application()
    app.router.add_get("/health", healthy)
    app.router.add_get("/v1/models", models)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        url = str(server.make_url("")).rstrip("/")
        waiting = until_ready(session, url, health_path="/health", api_key=None, model_id="m", owns_port=owner)
        if ready:
            await asyncio.wait_for(waiting, 5)
        else:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(waiting, 0.3)
