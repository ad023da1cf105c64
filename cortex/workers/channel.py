"""Messages over a stream socket: MessagePack with a length prefix."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

import msgspec

Received = TypeVar("Received")

_LENGTH = struct.Struct("!I")


class Channel(Generic[Received]):
    """One end of a connection. Sending never waits: messages are small, and the other end always reads."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: msgspec.msgpack.Decoder[Received]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = received
        self._encoder = msgspec.msgpack.Encoder()

    @classmethod
    async def over(cls, sock: socket.socket, received: msgspec.msgpack.Decoder[Received]) -> Channel[Received]:
        """The channel over a connected socket, which it takes over."""
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(reader, writer, received)

    def send(self, message: Any) -> None:
        """Does nothing if the other end is gone; `messages` ends then."""
        if not self._writer.is_closing():
            data = self._encoder.encode(message)
            self._writer.write(_LENGTH.pack(len(data)) + data)

    async def messages(self) -> AsyncIterator[Received]:
        """The messages of the other end, until it is gone."""
        while True:
            try:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                yield self._decoder.decode(await self._reader.readexactly(length))
            except (asyncio.IncompleteReadError, ConnectionError):
                return

    async def close(self) -> None:
        """Sends what is buffered, then closes."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return
