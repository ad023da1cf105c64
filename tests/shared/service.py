"""A tiny service for the tests of shared.serve: `python -m tests.shared.service DRAIN_SECS [LIFELINE_FD]`.

Prints "port N" once it listens and "in flight" once a request has begun; a line on standard input ends requests.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from aiohttp import web

from shared.serve import CLOSING, Site, bind, serve_until_stopped

LET_GO = web.AppKey("let_go", asyncio.Event)


async def held(request: web.Request) -> web.StreamResponse:
    """Half of the answer at once, the rest when the test says so."""
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"first ")
    print("in flight", flush=True)
    await request.app[LET_GO].wait()
    await response.write(b"last")
    return response


async def events(request: web.Request) -> web.StreamResponse:
    """An endless stream."""
    response = web.StreamResponse()
    await response.prepare(request)
    print("in flight", flush=True)
    await request.app[CLOSING].wait()
    await response.write(b"closing")
    return response


async def main(drain_timeout_secs: float, lifeline: int | None) -> None:
    app = web.Application()
    app[LET_GO] = let_go = asyncio.Event()
    app.add_routes([web.get("/held", held), web.get("/events", events)])

    async def cleanup(app: web.Application) -> None:
        print("cleaned up", flush=True)

    app.on_cleanup.append(cleanup)
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), let_go.set)
    site = Site(app, bind("127.0.0.1", 0))
    await serve_until_stopped(
        [site],
        drain_timeout_secs=drain_timeout_secs,
        lifeline=lifeline,
        on_ready=lambda: print(f"port {site.port}", flush=True),
        on_forced_exit=lambda: print("forced", flush=True),
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    asyncio.run(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
