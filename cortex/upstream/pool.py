"""Connections to engines: opened, kept while they are good, and counted."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

from cortex.upstream.connection import EngineConnection
from cortex.upstream.replica import FailureKind
from shared.tasks import timeout

IDLE_SECS: Final = 3.0
"""How long an idle connection to an engine is kept: below the 5 s after which vLLM's server closes it itself."""
CONNECT_TIMEOUT_SECS: Final = 5.0
RESOLVED_SECS: Final = 10.0
"""How long a host's addresses are remembered."""
_SWEEP_SECS: Final = 1.0


class Address(NamedTuple):
    """Where connections go to; those of one address are alike. `port` 0: `host` names a Unix socket, with a leading NUL
    one of Linux's abstract namespace."""

    host: str
    port: int
    tls: bool = False

    @property
    def authority(self) -> bytes:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.port == (443 if self.tls else 80):
            return host.encode()
        return f"{host}:{self.port}".encode()


class NoConnection(Exception):
    """None could be opened. Refused (also: no route, no such name) means that nobody is there, a time-out that somebody
    may be, and is busy."""

    def __init__(self, reason: str, kind: FailureKind) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind: FailureKind = kind


def parse_url(url: str) -> tuple[Address, bytes]:
    """Where a base URL leads, and the path prefix that it has.

    Raises:
        ValueError: it is no http or https URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"not an HTTP URL: {url!r}")
    tls = parts.scheme == "https"
    return Address(parts.hostname, parts.port or (443 if tls else 80), tls), parts.path.rstrip("/").encode("ascii")


class EnginePool:
    """Owns every connection to an engine; another one those to the neurons."""

    def __init__(self, idle_secs: float = IDLE_SECS) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle_secs = idle_secs
        self._idle: dict[Address, list[EngineConnection]] = {}
        self._open: set[EngineConnection] = set()
        self._resolved: dict[tuple[str, int], tuple[float, list[str]]] = {}
        self._tls: ssl.SSLContext | None = None
        self._sweeping: asyncio.TimerHandle | None = None

    def take(self, address: Address) -> EngineConnection | None:
        """An idle connection, the last used first; None when there is none that is good."""
        idle = self._idle.get(address)
        oldest = self._loop.time() - self._idle_secs
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing() and connection.idle_since > oldest:
                return connection
            connection.transport.abort()
        return None

    def put(self, connection: EngineConnection) -> None:
        """Takes a connection back."""
        connection.idle_since = self._loop.time()
        self._idle.setdefault(connection.address, []).append(connection)
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(_SWEEP_SECS, self._sweep)

    async def connect(self, address: Address, on_made: Callable[[EngineConnection], None]) -> None:
        """Opens a new connection, which `on_made` is called with.

        Raises:
            NoConnection: there is none to be had within CONNECT_TIMEOUT_SECS.
        """

        def factory() -> asyncio.Protocol:
            return cast(asyncio.Protocol, EngineConnection(self, address, on_made))

        try:
            async with timeout(CONNECT_TIMEOUT_SECS):
                if address.port:
                    await self._connect_tcp(address, factory)
                else:
                    await self._connect_unix(address, factory)
        except (asyncio.TimeoutError, TimeoutError) as error:  # two classes before Python 3.11
            raise NoConnection(f"no connection within {CONNECT_TIMEOUT_SECS:g} s", "timeout") from error
        except (OSError, UnicodeError) as error:  # UnicodeError: a host that is no name
            raise NoConnection(str(error) or type(error).__name__, "refused") from error

    async def _connect_unix(self, address: Address, factory: Callable[[], asyncio.Protocol]) -> None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            sock.connect(address.host)  # at once, or it fails because the other side's backlog is full
            await self._loop.create_unix_connection(factory, sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _connect_tcp(self, address: Address, factory: Callable[[], asyncio.Protocol]) -> None:
        failure: OSError | None = None
        for host in await self._resolve(address.host, address.port):
            try:
                await self._loop.create_connection(
                    factory,
                    host,
                    address.port,
                    ssl=self._tls_context() if address.tls else None,
                    server_hostname=address.host if address.tls else None,
                )
            except OSError as error:
                failure = error
            else:
                return
        raise failure or OSError(f"{address.host} has no address")

    def opened(self, connection: EngineConnection) -> None:
        self._open.add(connection)

    def closed(self, connection: EngineConnection) -> None:
        self._open.discard(connection)
        idle = self._idle.get(connection.address)
        if idle and connection in idle:
            idle.remove(connection)

    def close(self) -> None:
        """Closes what is open."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        for connection in list(self._open):
            connection.transport.abort()

    async def _resolve(self, host: str, port: int) -> list[str]:
        known = self._resolved.get((host, port))
        if known is not None and known[0] > self._loop.time():
            return known[1]
        if _is_ip(host):
            until, found = float("inf"), [host]
        else:
            infos = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            until, found = self._loop.time() + RESOLVED_SECS, [str(info[4][0]) for info in infos]
        self._resolved[host, port] = until, found
        return found

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def _sweep(self) -> None:
        """Closes what has been idle too long, and looks again while anything is idle."""
        oldest = self._loop.time() - self._idle_secs
        for address, idle in list(self._idle.items()):
            for connection in idle:
                if connection.idle_since > oldest:
                    break  # they stand in the order in which they came back
                connection.transport.abort()
            self._idle[address] = [c for c in idle if c.idle_since > oldest]
            if not self._idle[address]:
                del self._idle[address]
        self._sweeping = self._loop.call_later(_SWEEP_SECS, self._sweep) if self._idle else None


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
