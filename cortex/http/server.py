"""Listens for clients, watches their deadlines, and lets them finish at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Sequence
from typing import cast

from cortex.http.connection import ClientConnection, Gateway
from cortex.http.connections import Connections
from shared.serve import BACKLOG
from shared.tasks import cancel_all, timeout

log = logging.getLogger(__name__)

SWEEP_SECS = 1.0
LAST_WORD_SECS = 1.0
"""For clients to be told that they get no more."""


@contextlib.asynccontextmanager
async def accepting(
    gateway: Gateway, socks: Sequence[socket.socket], *, drain_timeout_secs: float
) -> AsyncIterator[None]:
    """Serves clients on listening sockets inside the body. On exit: stop accepting, let requests finish within the
    deadline, then tell those that are left that they get no more, and close."""
    loop = asyncio.get_running_loop()
    connections = Connections()

    def accept() -> asyncio.Protocol:
        return cast(asyncio.Protocol, ClientConnection(gateway, connections))

    servers = [await loop.create_server(accept, sock=sock, backlog=BACKLOG) for sock in socks]
    sweeper = loop.create_task(_sweep(gateway, connections), name="client deadlines")
    try:
        yield
    finally:
        for server in servers:
            server.close()
        await _drain(gateway, connections, drain_timeout_secs)
        await cancel_all([sweeper])


async def _sweep(gateway: Gateway, connections: Connections) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECS)
        now = time.monotonic()
        for connection in list(connections):
            if 0 < connection.deadline < now:
                connection.expired()


async def _drain(gateway: Gateway, connections: Connections, timeout_secs: float) -> None:
    gateway.draining = True
    for connection in list(connections):
        if not connection.working:
            connection.close()
    with contextlib.suppress(asyncio.TimeoutError):
        async with timeout(timeout_secs):
            await connections.empty.wait()
    if connections:
        log.warning("cutting %d connections that did not finish in %g s", len(connections), timeout_secs)
    for connection in list(connections):
        connection.stop()
    with contextlib.suppress(asyncio.TimeoutError):
        async with timeout(LAST_WORD_SECS):
            await connections.empty.wait()
    for connection in list(connections):
        connection.transport.abort()
    await connections.empty.wait()
