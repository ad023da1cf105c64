"""Accepts clients, enforces their deadlines, and drains them on shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Sequence
from typing import cast

from cortex.http.connection import ClientConnection, Dispatcher
from cortex.http.tls_listener import TlsListener
from shared.serve import BACKLOG, UNANSWERED_CHECK_SECS
from shared.tasks import cancel_all, timeout
from shared.tls import RenewedContext

log = logging.getLogger(__name__)

SWEEP_SECS = 1.0
LAST_WORD_SECS = 1.0
"""How long clients have to receive their last error after the drain timeout."""


class OpenConnections:
    """Implements `connection.ConnectionSet`; `empty` is set while there are none."""

    def __init__(self) -> None:
        self.all: set[ClientConnection] = set()
        self.empty = asyncio.Event()
        self.empty.set()

    def opened(self, connection: ClientConnection) -> None:
        self.all.add(connection)
        self.empty.clear()

    def closed(self, connection: ClientConnection) -> None:
        self.all.discard(connection)
        if not self.all:
            self.empty.set()


@contextlib.asynccontextmanager
async def accepting(
    dispatcher: Dispatcher,
    socks: Sequence[socket.socket],
    *,
    drain_timeout_secs: float,
    tick_secs: float = SWEEP_SECS,
    tls: RenewedContext | None = None,
) -> AsyncIterator[None]:
    """Serves clients on listening sockets inside the body, over TLS if `tls` is given. Handlers are called every
    `tick_secs`, at least every SWEEP_SECS. On exit: stops accepting, waits up to `drain_timeout_secs` for requests to
    finish, sends the remaining ones an error, and closes."""
    loop = asyncio.get_running_loop()
    connections = OpenConnections()

    def accept() -> asyncio.Protocol:
        return cast(asyncio.Protocol, ClientConnection(dispatcher, connections))

    if tls is None:
        servers = [await loop.create_server(accept, sock=sock, backlog=BACKLOG) for sock in socks]
        listeners = []
    else:
        servers = []
        listeners = [TlsListener(sock, dispatcher, accept, tls) for sock in socks]
    sweeper = loop.create_task(_sweep(connections, min(tick_secs, SWEEP_SECS)), name="client deadlines")
    try:
        yield
    finally:
        for server in servers:
            server.close()
        for listener in listeners:
            await listener.close()
        await _drain(dispatcher, connections, drain_timeout_secs)
        await cancel_all([sweeper])


async def _sweep(connections: OpenConnections, secs: float) -> None:
    checked = time.monotonic()
    while True:
        await asyncio.sleep(secs)
        now = time.monotonic()
        check = now - checked >= UNANSWERED_CHECK_SECS
        if check:
            checked = now
        for connection in list(connections.all):
            connection.tick(now, check_client=check)


async def _drain(dispatcher: Dispatcher, connections: OpenConnections, timeout_secs: float) -> None:
    dispatcher.draining = True
    for connection in list(connections.all):
        if not connection.working:
            connection.close()
    with contextlib.suppress(asyncio.TimeoutError):
        async with timeout(timeout_secs):
            await connections.empty.wait()
    if connections.all:
        log.warning("cutting %d connections that did not finish in %g s", len(connections.all), timeout_secs)
    for connection in list(connections.all):
        connection.stop()
    with contextlib.suppress(asyncio.TimeoutError):
        async with timeout(LAST_WORD_SECS):
            await connections.empty.wait()
    for connection in list(connections.all):
        connection.transport.abort()
    await connections.empty.wait()
