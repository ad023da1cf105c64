"""Which clients are connected."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cortex.http.connection import ClientConnection


class Connections(set["ClientConnection"]):
    """The open ones; `empty` is set while there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = asyncio.Event()
        self.empty.set()

    def opened(self, connection: ClientConnection) -> None:
        self.add(connection)
        self.empty.clear()

    def closed(self, connection: ClientConnection) -> None:
        self.discard(connection)
        if not self:
            self.empty.set()
