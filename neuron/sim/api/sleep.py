"""vLLM 0.32's sleep mode: development routes behind neuron's guard, and memory that is freed and taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from neuron.harness.vllm.guard.neuron_guard import (
    BUSY,
    CONTROL_HEADER,
    IDLE_SECS,
    NOT_FOUND,
    SLEEPING,
    SLEEPING_HEADER,
    is_open,
    knows_key,
    needs_the_model,
)
from neuron.sim.api.errors import ApiError, bad_request
from neuron.sim.engine import console
from neuron.sim.engine.engine import SimEngine
from neuron.sim.engine.memory import DeviceMemory, OutOfMemory

DEV_MODE_VARIABLE = "VLLM_SERVER_DEV_MODE"
_CONTEXT_MB = 400  # of each device: what a CUDA context keeps during a sleep
_MODES = ("abort", "wait", "keep")


@dataclass
class Sleeper:
    """Puts the engine to sleep and wakes it, one at a time; new requests are refused meanwhile.

    In every mode, running requests are finished first (vLLM's `wait`, the mode that neuron uses).
    """

    engine: SimEngine
    memory: DeviceMemory
    closed: bool = False  # from the start of a sleep until the engine is awake
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def asleep_mb(self) -> int:
        """MiB that stay on the devices during a sleep."""
        held = self.engine.settings.vram_mb
        return min(_CONTEXT_MB * self.engine.settings.devices, held // 10)

    async def sleep(self, level: int) -> None:
        """Raises asyncio.TimeoutError when requests are still running after 10 s."""
        async with self._turn:
            if self.engine.sleep_level:
                return
            self.closed = True
            try:
                await asyncio.wait_for(self.engine.slots.emptied(), IDLE_SECS)
            except (asyncio.CancelledError, asyncio.TimeoutError):
                self.closed = False
                raise
            self.memory.change_to(self.asleep_mb)
            self.engine.sleep_level = level
            console.log("EngineCore", "executor.py:268", "It took 0.1 seconds to fall asleep.")

    async def wake(self) -> None:
        """Raises OutOfMemory when its memory was taken meanwhile; it stays asleep then."""
        async with self._turn:
            if not self.engine.sleep_level:
                return
            self.memory.change_to(self.engine.settings.vram_mb)
            await asyncio.sleep(self.engine.settings.wake_secs)
            self.engine.sleep_level = 0
            self.closed = False
            console.log(
                "EngineCore", "executor.py:291", f"It took {self.engine.settings.wake_secs:g} seconds to wake up."
            )


SLEEPER = web.AppKey("sleeper", Sleeper)


def in_dev_mode(environ: Mapping[str, str]) -> bool:
    """True when vLLM would open its development routes. Raises ValueError, as vLLM does, for anything but a number."""
    return bool(int(environ.get(DEV_MODE_VARIABLE, "0")))


async def _sleep(request: web.Request) -> web.Response:
    level, mode = request.query.get("level", "1"), request.query.get("mode", "abort")
    if level not in ("1", "2"):
        raise bad_request(f"level: must be 1 or 2, got {level!r}", "level")
    if mode not in _MODES:
        raise bad_request(f"mode: must be one of {', '.join(_MODES)}, got {mode!r}", "mode")
    try:
        await request.app[SLEEPER].sleep(int(level))
    except asyncio.TimeoutError:
        return web.Response(status=409, body=BUSY, content_type="application/json")
    return web.json_response({"status": "sleeping", "level": int(level)})


async def _wake_up(request: web.Request) -> web.Response:
    try:
        await request.app[SLEEPER].wake()
    except OutOfMemory as error:
        message = f"Call to wake_up method failed: {error}"
        console.log("APIServer", "launcher.py:112", message, level="ERROR")
        raise ApiError(500, message, "Internal Server Error") from error
    return web.json_response({"status": "awake", "tags": None})


async def _is_sleeping(request: web.Request) -> web.Response:
    return web.json_response({"is_sleeping": bool(request.app[SLEEPER].engine.sleep_level)})


def add_sleep_routes(app: web.Application, sleeper: Sleeper) -> None:
    """Adds vLLM's routes. The guard must be among the app's middlewares."""
    app[SLEEPER] = sleeper
    app.router.add_post("/sleep", _sleep)
    app.router.add_post("/wake_up", _wake_up)
    app.router.add_get("/is_sleeping", _is_sleeping)


def guard(sleeper: Sleeper | None, digest: str | None) -> Middleware:
    """Middleware with the rules of `neuron_guard.Guard`."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not is_open(request.path) and not knows_key(request.headers.getall(CONTROL_HEADER, []), digest):
            return web.Response(status=404, body=NOT_FOUND, content_type="application/json")
        if sleeper is not None and sleeper.closed and needs_the_model(request.method, request.path):
            headers = {"Retry-After": "1", SLEEPING_HEADER: "1"}
            return web.Response(status=503, body=SLEEPING, content_type="application/json", headers=headers)
        return await handler(request)

    return check
