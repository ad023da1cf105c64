"""The life of an engine process: bind, load, listen, serve, stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Coroutine
from typing import Any

from aiohttp import web

from neuron.harness.vllm.guard.neuron_guard import DIGEST_VARIABLE
from neuron.sim.api.adapters import updates_adapters
from neuron.sim.api.server import build_app
from neuron.sim.api.sleep import Sleeper, in_dev_mode
from neuron.sim.engine import console
from neuron.sim.engine.arguments import EngineSettings
from neuron.sim.engine.engine import SimEngine
from neuron.sim.engine.faults import Fault, spawn_stubborn_child
from neuron.sim.engine.memory import DeviceMemory, OutOfMemory
from neuron.sim.process.core import CoreState, EngineCore
from neuron.sim.process.group import GroupLink, PartLost
from neuron.sim.process.loading import (
    load,
    report_dead_core,
    report_failed_start,
    report_lost_part,
    report_out_of_memory,
    report_unsupported_model,
)

# Time for aborted requests to write their last event; clients that do not read are dropped.
_SHUTDOWN_TIMEOUT_SECS = 0.5
_KEEP_ALIVE_SECS = 5  # as vLLM
# From the death of the core to the exit of the server, as measured with vLLM 0.32.
_AFTER_CORE_SECS = 1.0


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so clients are refused. Raises OSError."""
    family, kind, proto, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


async def run(settings: EngineSettings, core: EngineCore) -> int:
    """Serves until SIGTERM or SIGINT, or until its core dies. Returns the process's exit status.

    SIGUSR1 stops all generation for good, and nothing else; SIGUSR2 makes `/health` return 503. Both are ignored until
    the engine serves.

    Raises:
        OSError: the address cannot be bound or listened on.
    """
    engine = SimEngine(settings)
    stop, ended = asyncio.Event(), asyncio.Event()  # asked to stop; asked to stop or core dead
    loop = asyncio.get_running_loop()

    def stop_now() -> None:
        stop.set()
        ended.set()

    def check_core() -> None:
        state = core.state()
        engine.stall(state is CoreState.STOPPED)
        if state is CoreState.DEAD and not engine.core_dead:
            engine.core_died()
            ended.set()

    loop.add_signal_handler(signal.SIGINT, stop_now)
    if not settings.faults.ignores_early_sigterm:
        loop.add_signal_handler(signal.SIGTERM, stop_now)
    loop.add_signal_handler(signal.SIGCHLD, check_core)
    check_core()  # it may be dead already
    if Fault.SPAWN_CHILD in settings.faults:
        spawn_stubborn_child()
    if Fault.UNSUPPORTED_MODEL in settings.faults:
        return report_unsupported_model()
    async with contextlib.AsyncExitStack() as cleanup:
        sock = None if settings.headless else cleanup.enter_context(bind(settings.host, settings.port))
        memory = DeviceMemory.from_environment(os.environ, holder=core.pid)
        link = await cleanup.enter_async_context(GroupLink(settings.group))
        try:
            if not await _unless(ended, _load(settings, memory, core, link)):
                return 0 if stop.is_set() else report_failed_start(-signal.SIGKILL)
        except OutOfMemory as error:
            return report_out_of_memory(error, core.pid)
        except PartLost as error:
            return report_lost_part(error, core.pid)
        link.when_lost(engine.hang)
        if Fault.LOSE_EARLY_SIGTERM in settings.faults:
            loop.add_signal_handler(signal.SIGTERM, stop_now)
        loop.add_signal_handler(signal.SIGUSR1, engine.hang)
        loop.add_signal_handler(signal.SIGUSR2, engine.turn_unhealthy)
        if sock is None:
            await ended.wait()
        else:
            await _serve(engine, core, memory, sock, stop=stop, ended=ended)
    return 0


async def _load(settings: EngineSettings, memory: DeviceMemory, core: EngineCore, link: GroupLink) -> None:
    """Raises OutOfMemory, or PartLost."""
    await link.meet()
    if not await _unless(link.lost, load(settings, memory, core.pid)) or not await _unless(link.lost, link.finish()):
        raise PartLost("Connection closed by peer")


async def _serve(
    engine: SimEngine,
    core: EngineCore,
    memory: DeviceMemory,
    sock: socket.socket,
    *,
    stop: asyncio.Event,
    ended: asyncio.Event,
) -> None:
    faults = engine.settings.faults
    app = build_app(
        engine,
        api_key=os.environ.get("VLLM_API_KEY") or None,
        sleeper=Sleeper(engine, memory) if in_dev_mode(os.environ) else None,
        updates_adapters=updates_adapters(os.environ),
        control_digest=os.environ.get(DIGEST_VARIABLE),
    )
    # handler_cancellation: a client that disconnects cancels its handler, and with it the generation.
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        shutdown_timeout=_SHUTDOWN_TIMEOUT_SECS,
        keepalive_timeout=float(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", _KEEP_ALIVE_SECS)),
        access_log=None,
        handle_signals=False,
    )
    await runner.setup()
    try:
        host, port = sock.getsockname()[:2]
        console.log("APIServer", "api_server.py:1893", f"Starting vLLM server on http://{host}:{port}")
        await web.SockSite(runner, sock).start()
        console.raw("APIServer", "INFO:     Application startup complete.")
        if Fault.CRASH_AFTER_SECS in faults and await _unless(
            ended, asyncio.sleep(faults.threshold(Fault.CRASH_AFTER_SECS))
        ):
            core.kill()
        await ended.wait()
        if not stop.is_set():
            report_dead_core()
            _ = await _unless(stop, asyncio.sleep(_AFTER_CORE_SECS))
    finally:
        engine.stop()
        await runner.cleanup()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, Any]) -> bool:
    """Runs `work` until it finishes or `stop` is set. True when it finished; raises its exception."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
            return True
        return False
    finally:
        for task in (working, stopping):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(working, stopping, return_exceptions=True)
