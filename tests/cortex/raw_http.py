"""HTTP/1.1 by hand on a raw socket: exact bytes at exact moments, and answers read strictly."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from shared.tasks import timeout
from tests.certificates import trusting
from tests.cortex.socket_queue import unread_bytes

DEADLINE_SECS = 60.0
"""The limit for every wait in these tests. In a passing run none comes near it."""

_LIMIT = 1 << 20
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[^\r\n]*)?\r\n")
_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([0-9]{3}) ([^\r\n]*)")

Result = TypeVar("Result")


class Truncated(Exception):
    """The peer ended or reset the connection before the end of a message."""


class Malformed(Exception):
    """The peer sent something that is not valid HTTP."""


async def bounded(work: Awaitable[Result], *, secs: float = DEADLINE_SECS) -> Result:
    """The result, or TimeoutError."""
    async with timeout(secs):
        return await work


async def until(condition: Callable[[], bool], *, secs: float = DEADLINE_SECS) -> None:
    """Polls for a condition without a notification (a kernel figure, a counter of another process)."""
    deadline = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < deadline, f"not within {secs:g} s"
        await asyncio.sleep(0.002)


async def settled(value: Callable[[], int], *, quiet_secs: float = 0.3, secs: float = 30.0) -> int:
    """The value once it has not changed for `quiet_secs`: nothing more is on its way then."""
    deadline, last, since = time.monotonic() + secs, value(), time.monotonic()
    while time.monotonic() - since < quiet_secs:
        assert time.monotonic() < deadline, f"does not settle within {secs:g} s"
        await asyncio.sleep(0.01)
        if value() != last:
            last, since = value(), time.monotonic()
    return last


class Wire(asyncio.StreamReaderProtocol):
    """One side of a connection. `gone` is set when the other side ends or resets it, `gone_at` is that moment."""

    def __init__(self, connected: Callable[[Wire], Awaitable[None]] | None = None) -> None:
        self.incoming = asyncio.StreamReader(limit=_LIMIT)
        self.gone = asyncio.Event()
        self.gone_at = 0.0
        self.connected = connected
        self.transport: asyncio.Transport
        self.serving: asyncio.Task[None] | None = None
        super().__init__(self.incoming)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport = cast("asyncio.Transport", transport)  # uvloop's do not derive from it
        self.writer = asyncio.StreamWriter(self.transport, self, self.incoming, asyncio.get_running_loop())
        self.sock: socket.socket = transport.get_extra_info("socket")
        self.addresses = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        if self.connected is not None:
            self.serving = asyncio.ensure_future(self.connected(self))

    def eof_received(self) -> bool:
        self._left()
        self.incoming.feed_eof()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._left()
        super().connection_lost(error)

    def _left(self) -> None:
        if not self.gone.is_set():
            self.gone_at = time.monotonic()
            self.gone.set()

    async def send(self, data: bytes) -> None:
        """Writes, waiting while the other side does not read."""
        self.writer.write(data)
        await self.writer.drain()

    async def send_apart(self, pieces: Iterable[bytes]) -> None:
        """Each piece is read by the other side before the next one leaves."""
        for piece in pieces:
            await self.send(piece)
            await asyncio.sleep(0)
            await until_yielding(lambda: self.unread() == 0)

    def unread(self) -> int:
        """Bytes in the other side's socket that its process has not read yet."""
        return unread_bytes(*self.addresses)

    def reset(self) -> None:
        """Ends the connection with an RST; what was not sent is lost."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def half_close(self) -> None:
        """Sends a FIN and reads on; only when everything has been sent. TLS has no end of one side."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends the connection with a FIN, after what was written."""
        self.transport.close()

    def stop_reading(self) -> None:
        """Leaves everything that arrives in the kernel's buffer."""
        self.transport.pause_reading()

    def read_on(self) -> None:
        self.transport.resume_reading()


async def until_yielding(condition: Callable[[], bool]) -> None:
    """As `until`, but only yields to the loop: for waits of microseconds, thousands of times."""
    deadline = time.monotonic() + DEADLINE_SECS
    while not condition():
        assert time.monotonic() < deadline, "the other side does not read"
        await asyncio.sleep(0)


@dataclass(frozen=True)
class Head:
    """A start line and headers, names in lower case, in their order."""

    start: str
    headers: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        return [value for found, value in self.headers if found == name.lower()]

    def get(self, name: str) -> str | None:
        """The only value of a header, None without one."""
        values = self.all(name)
        assert len(values) <= 1, f"{name} is given {len(values)} times: {values}"
        return values[0] if values else None


@dataclass(frozen=True)
class Answer(Head):
    """A whole answer. `framing` is length, chunked, close or none; `interim` the statuses of 1xx answers before it."""

    status: int = 0
    body: bytes = b""
    framing: str = "none"
    interim: list[int] = field(default_factory=list)


async def read_head(reader: asyncio.StreamReader, *, secs: float = DEADLINE_SECS) -> Head | None:
    """The next head, None when the connection ends before its first byte.

    Raises:
        Truncated, Malformed
    """
    try:
        raw = await bounded(reader.readuntil(b"\r\n\r\n"), secs=secs)
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise Truncated(f"in a head: {error.partial!r}") from error
    except ConnectionError as error:
        raise Truncated(f"before the end of a head: {error!r}") from error
    start, *lines = raw[:-4].decode("latin-1").split("\r\n")
    headers = []
    for line in lines:
        match = re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*", line)
        if match is None:
            raise Malformed(f"header line {line!r}")
        headers.append((match[1].lower(), match[2]))
    return Head(start, headers)


async def read_chunked(reader: asyncio.StreamReader) -> bytes:
    """The payload of a chunked body, up to the end of its trailers. Raises as `read_body`."""
    payload = bytearray()
    while True:
        line = await bounded(reader.readuntil(b"\n"))
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise Malformed(f"chunk line {line!r} after {bytes(payload[-80:])!r}")
        size = int(match[1], 16)
        if size == 0:
            break
        payload += await bounded(reader.readexactly(size))
        if (end := await bounded(reader.readexactly(2))) != b"\r\n":
            raise Malformed(f"a chunk of {size} bytes is followed by {end!r}")
    while (line := await bounded(reader.readuntil(b"\n"))) != b"\r\n":
        if not re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n]*\r\n", line):
            raise Malformed(f"trailer line {line!r}")
    return bytes(payload)


def framing_of(head: Head) -> tuple[str, int]:
    """How the body ends: ("chunked", 0), ("length", n) or ("close", 0)."""
    coding, length = head.get("transfer-encoding"), head.get("content-length")
    if coding is not None:
        if coding.lower() != "chunked" or length is not None:
            raise Malformed(f"Transfer-Encoding {coding!r}, Content-Length {length!r}")
        return "chunked", 0
    if length is None:
        return "close", 0
    if not re.fullmatch("[0-9]+", length):
        raise Malformed(f"Content-Length {length!r}")
    return "length", int(length)


async def read_body(reader: asyncio.StreamReader, framing: str, length: int) -> bytes:
    """The body, to its end.

    Raises:
        Truncated: the connection ended before it, or was reset.
        Malformed: the framing is wrong.
    """
    try:
        if framing == "chunked":
            return await read_chunked(reader)
        if framing == "length":
            return await bounded(reader.readexactly(length))
        return await bounded(reader.read(-1))
    except asyncio.IncompleteReadError as error:
        raise Truncated(f"in a body with framing {framing}: {error.partial[-80:]!r}") from error
    except ConnectionError as error:
        raise Truncated(f"in a body with framing {framing}: {error!r}") from error


class RawClient(Wire):
    """A client on a raw socket."""

    async def head(self) -> Head:
        """The next head; a connection that ends before it is an error."""
        head = await read_head(self.incoming)
        if head is None:
            raise Truncated("the connection was closed without an answer")
        return head

    async def answer(self, method: str = "POST") -> Answer:
        """The next answer, read as a strict client does. Raises as `read_body`."""
        interim: list[int] = []
        while True:
            head = await self.head()
            match = _STATUS_LINE.fullmatch(head.start)
            if match is None:
                raise Malformed(f"status line {head.start!r}")
            status = int(match[1])
            if status >= 200 or status == 101:
                break
            interim.append(status)
        if method == "HEAD" or status in (204, 304):
            return Answer(head.start, head.headers, status, interim=interim)
        framing, length = framing_of(head)
        body = await read_body(self.incoming, framing, length)
        return Answer(head.start, head.headers, status, body, framing, interim)

    async def ask(self, data: bytes, method: str = "POST") -> Answer:
        """Sends a request and reads its answer."""
        await self.send(data)
        return await self.answer(method)

    async def rest(self) -> bytes:
        """Reads until the server closes. b"" if nothing comes, or after a reset."""
        try:
            return await bounded(self.incoming.read(-1))
        except ConnectionError:
            return b""


@contextlib.asynccontextmanager
async def connected(
    url: str, *, receive_buffer: int | None = None, sock: socket.socket | None = None
) -> AsyncIterator[RawClient]:
    """A connection to the server of a URL, by `sock` if one is given; `receive_buffer` is the socket's, in bytes."""
    address = urlsplit(url)
    sock = sock or socket.socket()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio does so only for sockets that it has made
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await bounded(loop.sock_connect(sock, (address.hostname, address.port)))
    except BaseException:
        sock.close()
        raise
    tls: dict[str, Any] = {"ssl": trusting(), "server_hostname": address.hostname} if address.scheme == "https" else {}
    _, client = await bounded(loop.create_connection(RawClient, sock=sock, **tls))
    try:
        yield client
    finally:
        client.transport.abort()


def request(
    body: bytes = b"",
    *lines: str,
    method: str = "POST",
    target: str = "/v1/completions",
    version: str = "HTTP/1.1",
    host: str | None = "cortex",
    length: bool = True,
) -> bytes:
    """A request's bytes; `lines` are further header lines. With `length` it has the body's Content-Length."""
    head = [f"{method} {target} {version}"]
    if host is not None:
        head.append(f"Host: {host}")
    head += lines
    if length and (body or method == "POST"):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def chunked(payload: bytes, size: int, *, line: str = "{:x}", trailers: bytes = b"") -> bytes:
    """The payload in chunks of `size` bytes; `line` spells a size."""
    parts = []
    for start in range(0, len(payload), size):
        piece = payload[start : start + size]
        parts.append(line.format(len(piece)).encode() + b"\r\n" + piece + b"\r\n")
    return b"".join(parts) + b"0\r\n" + trailers + b"\r\n"


def every_split(data: bytes) -> Iterable[tuple[bytes, bytes]]:
    """The data in two, at each position."""
    return ((data[:position], data[position:]) for position in range(1, len(data)))


def single_bytes(data: bytes) -> Iterable[bytes]:
    return (data[position : position + 1] for position in range(len(data)))
