"""A protocol v1 neuron with one loaded model, which the fake engine serves. `python -m ... PORT ENGINE_URL [bare]`."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable

from aiohttp import web

from benchmarks.engine.answers import CREATED, MODEL
from benchmarks.loops import run

INSTANCE = "bench-1"
_VRAM_MB = 81920


def build_app(engine_url: str, *, bare: bool = False) -> web.Application:
    """The six endpoints of protocol v1. Unless `bare`, with `since` and `instance_id`, by which our neuron tells of a
    reload."""
    own = {} if bare else {"instance_id": INSTANCE}
    devices = [{"index": 0, "name": "GPU", "vram_total_mb": _VRAM_MB, "compute_capability": "9.0"}]
    used = [{"index": 0, "vram_used_mb": 1, "vram_free_mb": _VRAM_MB - 1, "utilization_pct": 0, "temp_c": 40}]
    entry = {"id": MODEL, "harness": "vllm", "status": "loaded", "devices": [0], "vram_used_mb": 1}
    if not bare:
        entry |= {"since": CREATED, "keep_alive_secs": 75.0}
    answers = {
        "/discovery": {
            "hostname": "bench",
            "os": "Linux",
            "kernel": "6.1",
            "cuda_version": "13.0",
            "driver_version": "580.1",
            "devices": devices,
            "harnesses": ["vllm"],
            **own,
        },
        "/health": {"uptime_secs": 5, "devices": used, **own},
        "/models": [entry],
        "/models/{model_id}/endpoint": {"url": engine_url},
    }
    app = web.Application()
    for path, answer in answers.items():
        app.router.add_get(path, _answering(answer))
    for path in ("/models/load", "/models/unload"):
        app.router.add_post(path, _answering({"status": path.rsplit("/", 1)[1] + "ed"}))
    return app


def _answering(value: object) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(value)

    return handler


async def _serve(port: int, engine_url: str, *, bare: bool) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(build_app(engine_url, bare=bare), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    run(_serve(int(sys.argv[1]), sys.argv[2], bare="bare" in sys.argv[3:]))
