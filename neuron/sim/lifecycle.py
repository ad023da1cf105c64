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

from neuron.inside.neuron_guard import DIGEST_VARIABLE
from neuron.sim import console
from neuron.sim.arguments import EngineSettings
from neuron.sim.engine import Engine
from neuron.sim.faults import Fault, spawn_stubborn_child
from neuron.sim.loading import load, report_out_of_memory
from neuron.sim.memory import DeviceMemory, OutOfMemory
from neuron.sim.server import build_app
from neuron.sim.sleep import Sleeper, in_dev_mode

# Aborted requests need a moment to write their last event; whoever does not read is not waited for.
_SHUTDOWN_TIMEOUT_SECS = 0.5


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: until it does, clients are refused. Raises OSError."""
    family, kind, proto, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


async def run(settings: EngineSettings) -> int:
    """Serves until SIGTERM or SIGINT. Returns the process's exit status.

    Raises:
        OSError: the address cannot be bound or listened on.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    if Fault.IGNORE_SIGTERM not in settings.faults:
        loop.add_signal_handler(signal.SIGTERM, stop.set)
    if Fault.SPAWN_CHILD in settings.faults:
        spawn_stubborn_child()
    with bind(settings.host, settings.port) as sock:
        memory = DeviceMemory.from_environment(os.environ)
        try:
            if not await _unless(stop, load(settings, memory)):
                return 0
        except OutOfMemory as error:
            report_out_of_memory(error)
            return 1
        await _serve(settings, memory, sock, stop)
    return 0


async def _serve(settings: EngineSettings, memory: DeviceMemory, sock: socket.socket, stop: asyncio.Event) -> None:
    engine = Engine(settings)
    app = build_app(
        engine,
        api_key=os.environ.get("VLLM_API_KEY") or None,
        sleeper=Sleeper(engine, memory) if in_dev_mode(os.environ) else None,
        control_digest=os.environ.get(DIGEST_VARIABLE),
    )
    # handler_cancellation: a client that leaves ends its handler, and with that the generation.
    runner = web.AppRunner(
        app, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_TIMEOUT_SECS, access_log=None, handle_signals=False
    )
    await runner.setup()
    try:
        host, port = sock.getsockname()[:2]
        console.log("APIServer", "api_server.py:1893", f"Starting vLLM server on http://{host}:{port}")
        await web.SockSite(runner, sock).start()
        console.raw("APIServer", "INFO:     Application startup complete.")
        if Fault.CRASH_AFTER_SECS in settings.faults:
            await _unless(stop, _crash(settings.faults.threshold(Fault.CRASH_AFTER_SECS)))
        await stop.wait()
    finally:
        engine.stop()
        await runner.cleanup()


async def _crash(secs: float) -> None:
    """Ends the process as vLLM's front end does when its engine dies: with status 0."""
    await asyncio.sleep(secs)
    console.log("APIServer", "async_llm.py:713", "AsyncLLM output_handler failed.", level="ERROR")
    console.raw("APIServer", "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.")
    os._exit(0)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Runs `work` to its end, or until `stop` is set. True when it came to its end; its failure is raised."""
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
