"""`python -m benchmarks.engine PORT`: the fake engine on loopback until SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys

from benchmarks.engine.server import Engine, EngineConnection
from benchmarks.limits import raise_open_files
from benchmarks.loops import run

BACKLOG = 16384


async def serve(port: int) -> None:
    """Serves until told to stop."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine = Engine()
    server = await loop.create_server(lambda: EngineConnection(engine), "127.0.0.1", port, backlog=BACKLOG)
    gc.freeze()
    gc.disable()  # no reference cycles here, and a collection would count as a contender's latency
    await stop.wait()
    server.close()


if __name__ == "__main__":
    raise_open_files()
    run(serve(int(sys.argv[1])))
