"""Writing to a connection without the event loop's detour."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

Write = Callable[[bytes], None]


def direct_writer(transport: asyncio.Transport) -> Write:
    """Writes to the socket at once, and leaves to the transport what the socket does not take.

    A transport queues what it is given and sends it when all that can be read has been read. With a thousand streams
    that costs a tenth more: by then the caches hold other connections. Not to be used after `connection_lost`, when the
    descriptor may already be somebody else's.
    """
    if transport.get_extra_info("sslcontext") is not None:
        return transport.write
    fd: int = transport.get_extra_info("socket").fileno()
    waiting = transport.get_write_buffer_size
    later = transport.write
    send = os.write

    def write(data: bytes) -> None:
        if waiting():  # behind what could not be sent before
            later(data)
            return
        try:
            sent = send(fd, data)
        except OSError:  # full, or broken: the transport finds out which
            later(data)
            return
        if sent != len(data):
            later(data[sent:])

    return write
