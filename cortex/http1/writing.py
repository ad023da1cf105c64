"""Writing to a connection without the event loop's detour."""

from __future__ import annotations

import asyncio
import os


class Writer:
    """Writes to the socket at once, and leaves to the transport what the socket does not take.

    A transport queues what it is given and sends it when all that can be read has been read: with a thousand streams
    the caches hold other connections by then. Not to be used after `connection_lost`, when the descriptor may already
    be somebody else's. `waiting`, `later` and `fd` are for the one place that does in line what `write` does.
    """

    __slots__ = ("fd", "later", "waiting")

    def __init__(self, transport: asyncio.Transport) -> None:
        self.waiting = transport.get_write_buffer_size
        self.later = transport.write
        # With TLS the socket's bytes are not the connection's: no descriptor is -1, and every write to it fails.
        secured = transport.get_extra_info("sslcontext") is not None
        self.fd: int = -1 if secured else transport.get_extra_info("socket").fileno()

    def write(self, data: bytes) -> None:
        if self.waiting():  # behind what could not be sent before
            self.later(data)
            return
        try:
            sent = os.write(self.fd, data)
        except OSError:  # full, or broken: the transport finds out which
            sent = 0
        if sent != len(data):
            self.later(data[sent:])
