"""Connections to one gateway."""

from __future__ import annotations

import asyncio
from types import TracebackType

from benchmarks.load.connection import ClientConnection

OPEN_AT_ONCE = 256


class Pool:
    """`size` connections, opened before anything is measured; those that a gateway closes are opened again."""

    def __init__(self, port: int, size: int) -> None:
        self._port = port
        self._size = size
        self.connections: list[ClientConnection] = []

    async def __aenter__(self) -> Pool:
        await self.refill()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self.connections:
            connection.close()
        await asyncio.sleep(0)

    async def refill(self) -> None:
        """Makes it whole again.

        Raises:
            OSError: connection refused.
        """
        self.connections = [connection for connection in self.connections if connection.transport is not None]
        while len(self.connections) < self._size:
            count = min(OPEN_AT_ONCE, self._size - len(self.connections))
            self.connections += await asyncio.gather(*(self.open() for _ in range(count)))

    async def open(self) -> ClientConnection:
        """One connection more."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(ClientConnection, "127.0.0.1", self._port)
        return connection
