"""The simplest proxy in Python: aiohttp's server and client in one handler, on uvloop.

`python -m ... PORT ENGINE_URL`."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator
from importlib import metadata

import aiohttp
from aiohttp import web

from benchmarks.contenders.contender import Contender, Launch, Place
from benchmarks.limits import raise_open_files
from benchmarks.loops import run

_HOP_BY_HOP = frozenset({"connection", "content-length", "host", "keep-alive", "transfer-encoding"})
_BACKLOG = 16384
_ENGINE = web.AppKey("engine", str)
_SESSION = web.AppKey("session", aiohttp.ClientSession)

log = logging.getLogger("access")


async def _forward(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
    async with request.app[_SESSION].post(request.app[_ENGINE] + request.path_qs, data=body, headers=headers) as answer:
        passed = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
        response = web.StreamResponse(status=answer.status, headers=passed)
        response.content_length = answer.content_length
        await response.prepare(request)
        sent = 0
        async for data in answer.content.iter_any():
            sent += len(data)
            await response.write(data)
        await response.write_eof()
    log.info("%s %s %d %d", request.method, request.path, answer.status, sent)
    return response


async def _session(app: web.Application) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        app[_SESSION] = session
        yield


async def _serve(port: int, engine: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    app = web.Application(client_max_size=64 << 20)
    app[_ENGINE] = engine
    app.cleanup_ctx.append(_session)
    app.router.add_post("/{path:.*}", _forward)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=_BACKLOG).start()
    await stop.wait()
    await runner.cleanup()


def _prepare(place: Place) -> Launch:
    command = [sys.executable, "-m", "benchmarks.contenders.aiohttp_proxy", str(place.port), place.engine_url]
    return Launch(command, version=metadata.version("aiohttp"))


AIOHTTP = Contender(
    "aiohttp",
    "plain aiohttp handler",
    "aiohttp's server and client in one handler on uvloop, pooled connections, one log line a request; no routing, "
    "no key, no metrics",
    _prepare,
)

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    raise_open_files()
    run(_serve(int(sys.argv[1]), sys.argv[2]))
