"""The pool of connections to engines: opens them, reuses idle ones, closes those that idle too long."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final, cast

from cortex.routing.replica import FailureKind
from cortex.upstream.address import Address
from cortex.upstream.connection import EngineConnection
from shared.serve import detect_vanished_server
from shared.system.tunnel import BUSY, OK, REFUSED
from shared.tasks import timeout
from shared.tls import RenewedContext

IDLE_SECS: Final = 3.0
"""How long an idle connection to an engine is kept, unless its neuron says how long the engine keeps it. uvicorn closes
it after 5 s."""
CONNECT_TIMEOUT_SECS: Final = 5.0
RESOLVED_SECS: Final = 10.0
"""How long resolved host names are cached."""
_SWEEP_SECS: Final = 1.0
_ANSWER_BYTES: Final = 1024
"""Read at once of the broker's answer, which is one line."""


class NoConnection(Exception):
    """No connection could be opened. `kind` "refused" (also no route, unknown host) means that nothing listens there,
    "timeout" that the server may only be busy."""

    def __init__(self, reason: str, kind: FailureKind) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind: FailureKind = kind


class EnginePool:
    """Owns the connections to all engines; a second pool owns those to the neurons."""

    def __init__(
        self, idle_secs: float = IDLE_SECS, tls: RenewedContext | None = None, *, broker: str | None = None
    ) -> None:
        """Without `tls`, https URLs need a certificate of one of the system's authorities. `broker` is the Unix socket
        of the process that has the connections of neurons with `dial = "out"`; without it they cannot be reached."""
        self._loop = asyncio.get_running_loop()
        self._idle_secs = idle_secs
        self._idle: dict[Address, list[EngineConnection]] = {}
        self._open: set[EngineConnection] = set()
        self._retired: set[EngineConnection] = set()  # of `_open`: not kept after their request
        self._resolved: dict[tuple[str, int], tuple[float, list[str]]] = {}
        self._tls = tls
        self._broker = broker
        self._system_tls: ssl.SSLContext | None = None
        self._sweeping: asyncio.TimerHandle | None = None

    def take(self, address: Address) -> EngineConnection | None:
        """An idle connection that is still open, most recently used first; None without one."""
        idle = self._idle.get(address)
        if not idle:
            return None
        oldest = self._oldest(address)
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing() and connection.idle_since > oldest:
                return connection
            connection.transport.abort()
        return None

    def _oldest(self, address: Address) -> float:
        """Connections there that are idle since an earlier time are not used again."""
        return self._loop.time() - (self._idle_secs if address.idle_secs is None else address.idle_secs)

    def put(self, connection: EngineConnection) -> None:
        """Takes an idle connection back."""
        if self._retired and connection in self._retired:
            connection.transport.abort()
            return
        connection.idle_since = self._loop.time()
        self._idle.setdefault(connection.address, []).append(connection)
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(_SWEEP_SECS, self._sweep)

    async def connect(self, address: Address, on_made: Callable[[EngineConnection], None]) -> None:
        """Opens a new connection and passes it to `on_made`.

        Raises:
            NoConnection: it failed, or took longer than CONNECT_TIMEOUT_SECS.
        """

        def factory() -> asyncio.Protocol:
            return cast(asyncio.Protocol, EngineConnection(self, address, on_made))

        try:
            async with timeout(CONNECT_TIMEOUT_SECS):
                if address.dialled:
                    await self._connect_dialled(address, factory)
                elif address.port:
                    await self._connect_tcp(address, factory)
                else:
                    await self._connect_unix(address, factory)
        except (asyncio.TimeoutError, TimeoutError) as error:  # two classes before Python 3.11
            raise NoConnection(f"no connection within {CONNECT_TIMEOUT_SECS:g} s", "timeout") from error
        except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
            raise NoConnection(_no_connection(address, error), "refused") from error

    async def _connect_dialled(self, address: Address, factory: Callable[[], asyncio.Protocol]) -> None:
        if self._broker is None:
            raise OSError('neurons with dial = "out" need [discovery] dial_listen in cortex.toml')
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            sock.connect(self._broker)
            await self._loop.sock_sendall(sock, f"{address.host} {address.port}\n".encode())
            answer = b""
            while not answer.endswith(b"\n"):
                arrived = await self._loop.sock_recv(sock, _ANSWER_BYTES)
                if not arrived:
                    raise OSError("the process that keeps the connections of neurons was restarted")
                answer += arrived
            if answer.startswith(BUSY):
                raise NoConnection(answer.removeprefix(BUSY).decode("utf-8", "replace").strip(), "timeout")
            if answer.strip() != OK:
                raise OSError(answer.removeprefix(REFUSED).decode("utf-8", "replace").strip())
            await self._loop.create_unix_connection(factory, sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _connect_unix(self, address: Address, factory: Callable[[], asyncio.Protocol]) -> None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            sock.connect(address.host)  # immediate, or fails because the other side's backlog is full
            await self._loop.create_unix_connection(factory, sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _connect_tcp(self, address: Address, factory: Callable[[], asyncio.Protocol]) -> None:
        failure: OSError | None = None
        for host in await self._resolve(address.host, address.port):
            try:
                transport, _ = await self._loop.create_connection(
                    factory,
                    host,
                    address.port,
                    ssl=self._tls_context() if address.tls else None,
                    server_hostname=address.host if address.tls else None,
                )
            except OSError as error:
                failure = error
            else:
                if not transport.is_closing():
                    detect_vanished_server(transport.get_extra_info("socket").fileno())
                return
        raise failure or OSError(f"{address.host} has no address")

    def retire(self, address: Address) -> None:
        """Closes the idle connections there now, and the others once their requests have ended. Connections that are
        opened later are kept as usual."""
        for connection in list(self._open):
            if connection.address[:3] == address[:3]:
                self._retired.add(connection)
        for place in [place for place in self._idle if place[:3] == address[:3]]:
            for connection in self._idle.pop(place):
                connection.transport.abort()

    def opened(self, connection: EngineConnection) -> None:
        self._open.add(connection)

    def closed(self, connection: EngineConnection) -> None:
        self._open.discard(connection)
        self._retired.discard(connection)
        idle = self._idle.get(connection.address)
        if idle and connection in idle:
            idle.remove(connection)

    def close(self) -> None:
        """Closes all connections."""
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
        if self._tls is not None:
            return self._tls.current
        if self._system_tls is None:
            self._system_tls = ssl.create_default_context()
        return self._system_tls

    def _sweep(self) -> None:
        """Closes what has been idle too long; runs again while anything is idle."""
        for address, idle in list(self._idle.items()):
            oldest = self._oldest(address)
            for connection in idle:
                if connection.idle_since > oldest:
                    break  # ordered by the time they became idle
                connection.transport.abort()
            self._idle[address] = [c for c in idle if c.idle_since > oldest]
            if not self._idle[address]:
                del self._idle[address]
        self._sweeping = self._loop.call_later(_SWEEP_SECS, self._sweep) if self._idle else None


def _no_connection(address: Address, error: OSError | UnicodeError) -> str:
    """Why a connection failed, in words that say what to check."""
    where = f"{address.host}:{address.port}" if address.port else "the socket"
    if isinstance(error, ConnectionRefusedError):
        return f"connection refused: nothing listens on {where}"
    if isinstance(error, socket.gaierror):
        return f"the host name {address.host!r} cannot be resolved: {error.strerror}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the TLS certificate of {where} is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails with {where} ({error.reason}): does its address need http:// instead of https://?"
    return str(error) or type(error).__name__


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
