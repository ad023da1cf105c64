"""Serving an aiohttp app, in commands and in tests: event loop (uvloop if installed), sockets, signals, draining.

Also detects peers that vanish without FIN or RST: a host without power, a pulled cable, a NAT entry that was dropped.
Left alone, a connection to such a peer stays open for hours, or for a quarter of an hour while data is outstanding.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import gc
import ipaddress
import logging
import os
import signal
import socket
import struct
import termios
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

from aiohttp import web

from shared.tasks import cancel_all, keep_running
from shared.tls import RenewedContext

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

Result = TypeVar("Result")

BACKLOG = 1024
MAX_LINE_BYTES = 131072
"""Of a request line, or of a header. Clients of cortex may send 64 KiB of head, which cortex adds to."""
MAX_HEADERS = 512
HANGUP_CHECK_SECS = 1.0
GC_THRESHOLD = 10_000
"""Allocations minus deallocations of container objects that start a collection of the youngest generation."""


class ProbeTimes(NamedTuple):
    """After `idle_secs` without a byte the kernel probes the peer, and gives up after `probes` unanswered ones that
    are `interval_secs` apart (tcp(7))."""

    idle_secs: int
    interval_secs: int
    probes: int

    @property
    def total_secs(self) -> int:
        """How long a silent connection to a vanished peer stays open."""
        return self.idle_secs + self.interval_secs * self.probes


SERVER_TIMES = ProbeTimes(10, 10, 3)
"""For connections to engines and neurons. The same total bounds unacknowledged data."""
CLIENT_TIMES = ProbeTimes(45, 15, 3)
"""For connections of clients: laptops that change networks come back with the same address."""
UNANSWERED_SECS = 90
"""How long a client's kernel may leave our data unacknowledged."""
UNANSWERED_CHECK_SECS = 5.0
"""How often to ask `is_unanswered`. Two answers in a row count: a probe may just have left."""

CLIENT_RETRY_SECS = 30
"""Most time between two attempts to reach a client that owes us acknowledgements or has no room for more data. The
kernel's own limit is 120 s, after which a client that stopped reading long ago would be noticed late."""

TCP_RTO_MAX_MS: Final = 44
"""Of linux/tcp.h, since Linux 6.15."""

_INFO: Final = struct.Struct("=BBBB20xI28xI")
"""The start of struct tcp_info (linux/tcp.h): state, ca_state, retransmits, probes, then unacked and last_ack_recv."""

_ESTABLISHED: Final = 1  # the first byte of struct tcp_info
_RESET: Final = struct.pack("ii", 1, 0)  # struct linger of socket(7): on, for no time

CLOSING = web.AppKey("closing", asyncio.Event)
"""Set when the service begins to stop. Event streams end then."""


@dataclass(frozen=True)
class Site:
    """An app and the socket it listens on, with TLS if `tls` is given."""

    app: web.Application
    sock: socket.socket
    tls: RenewedContext | None = None

    @property
    def port(self) -> int:
        return int(self.sock.getsockname()[1])


class ListenError(Exception):
    """Cannot listen on an address; the message names it."""


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Like asyncio.run, with a rarer garbage collection: reference counting frees what requests leave behind."""
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    if uvloop is None:
        return asyncio.run(main)
    return uvloop.run(main)


def settle() -> None:
    """Excludes the objects of the start-up from garbage collection. Call it before clients are served: it blocks for
    0.1 s and more."""
    gc.collect()
    gc.freeze()


def detect_vanished_server(fd: int) -> None:
    """Makes the kernel end the connection with ETIMEDOUT after SERVER_TIMES. TCP_USER_TIMEOUT also ends it when the
    server stops reading for that long.

    Takes the descriptor because a uvloop transport's socket makes a new object for each option.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)  # the family does not matter for options
    try:
        _probe(sock, SERVER_TIMES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SERVER_TIMES.total_secs * 1000)
    finally:
        sock.detach()  # the transport closes it


def detect_vanished_clients(listening: socket.socket) -> None:
    """Makes the kernel end silent connections that are accepted from this socket after CLIENT_TIMES.

    Not TCP_USER_TIMEOUT: it would cut a client that is alive and stops reading for minutes. While data is outstanding
    the kernel sends no keep-alive probes, so `is_unanswered` must be asked as well.
    """
    _probe(listening, CLIENT_TIMES)
    with contextlib.suppress(OSError):
        listening.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, CLIENT_RETRY_SECS * 1000)


def is_unanswered(sock: socket.socket) -> bool:
    """True if the peer's kernel has acknowledged nothing for UNANSWERED_SECS although it was sent data or probed.

    The kernel of a client that does not read acknowledges each probe.
    """
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    _, _, _, probes, unacknowledged, last_ack_ms = _INFO.unpack(info)
    return bool(probes or unacknowledged) and int(last_ack_ms) > UNANSWERED_SECS * 1000


def is_established(sock: socket.socket) -> bool:
    """True while neither side has closed or reset this TCP connection."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED


def is_tls_over(transport: asyncio.Transport, *, closing: bool) -> bool:
    """True if nothing more passes on a TLS connection: the peer has closed TCP, or it is `closing` and the peer's
    kernel has everything. asyncio waits for the peer's end of TLS, which an idle client may never send."""
    sock = transport.get_extra_info("socket")
    try:
        if not closing:
            return not is_established(sock)
        return not transport.get_write_buffer_size() and not any(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
    except OSError:  # closed
        return True


def reset_on_close(sock: socket.socket) -> None:
    """The peer gets a reset when this connection is closed, so that it cannot take the close for a clean end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def _probe(sock: socket.socket, times: ProbeTimes) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, times.idle_secs)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, times.interval_secs)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, times.probes)


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening TCP socket; port 0 lets the system choose. `shared`: several sockets can bind the address, each
    with its own queue of connections (SO_REUSEPORT).

    Raises:
        ListenError: the address is in use or not an address of this host.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as error:  # a name that cannot be in DNS
        raise ListenError(f"cannot listen on {host}:{port}: {error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        detect_vanished_clients(sock)
        sock.bind(address)
        sock.listen(BACKLOG)  # at once: with SO_REUSEADDR a conflict shows only in listen()
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


def reaches_network(sock: socket.socket) -> bool:
    """True unless only this host can connect: the socket is bound to more than loopback."""
    host = str(sock.getsockname()[0])
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return not (mapped or address).is_loopback


@contextlib.asynccontextmanager
async def serving(sites: Sequence[Site], *, drain_timeout_secs: float) -> AsyncIterator[asyncio.Event]:
    """Serves the sites inside the body, which may set the event (CLOSING) early. On exit: stop accepting, finish
    requests in flight within the deadline, cancel the rest, then run the apps' cleanup.

    A handler is cancelled when its client disconnects (aiohttp's own default is off in
    production and on in its test server).
    """
    # aiohttp treats 0 as no timeout.
    shutdown_timeout = max(drain_timeout_secs, 0.001)
    runners: list[web.AppRunner] = []
    closing = asyncio.Event()
    watching = [asyncio.create_task(_abort_unanswered(runners), name="vanished clients")]
    try:
        for site in sites:
            site.app[CLOSING] = closing
            runner = web.AppRunner(
                site.app,
                handler_cancellation=True,
                shutdown_timeout=shutdown_timeout,
                access_log=None,
                # aiohttp answers longer ones itself, without the error envelope.
                max_line_size=MAX_LINE_BYTES,
                max_field_size=MAX_LINE_BYTES,
                max_headers=MAX_HEADERS,
            )
            runners.append(runner)
            await runner.setup()
            context = None
            if site.tls is not None:
                context = site.tls.current
                context.sni_callback = site.tls.switch
                watching.append(asyncio.create_task(keep_running("TLS files", site.tls.watch_loop), name="TLS files"))
            await web.SockSite(runner, site.sock, backlog=BACKLOG, ssl_context=context).start()
        yield closing
    finally:
        closing.set()
        await cancel_all(watching)
        results = await asyncio.gather(*(runner.cleanup() for runner in runners), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result


async def _abort_unanswered(runners: Sequence[web.AppRunner]) -> None:
    """Aborts connections whose client acknowledges nothing. Never returns."""
    suspects: set[asyncio.Transport] = set()
    while True:
        await asyncio.sleep(UNANSWERED_CHECK_SECS)
        servers = [runner.server for runner in runners if runner.server is not None]
        transports = [connection.transport for server in servers for connection in server.connections]
        unanswered = {transport for transport in transports if transport is not None and _is_unanswered(transport)}
        for transport in unanswered & suspects:
            transport.abort()
        suspects = unanswered - suspects


def _is_unanswered(transport: asyncio.BaseTransport) -> bool:
    sock = transport.get_extra_info("socket")
    return sock.family != socket.AF_UNIX and is_unanswered(sock)


async def serve_until_stopped(
    sites: Sequence[Site],
    *,
    drain_timeout_secs: float,
    lifeline: int | None = None,
    on_ready: Callable[[], None] = lambda: None,
    on_forced_exit: Callable[[], None] = lambda: None,
) -> None:
    """Serves until `told_to_stop` fires."""
    async with (
        told_to_stop(lifeline=lifeline, grace_secs=drain_timeout_secs, on_forced_exit=on_forced_exit) as stop,
        serving(sites, drain_timeout_secs=drain_timeout_secs),
    ):
        on_ready()
        await stop.wait()


@contextlib.asynccontextmanager
async def told_to_stop(
    *,
    lifeline: int | None,
    grace_secs: float,
    on_hangup: Callable[[], None] | None = None,
    on_restart: Callable[[], None] | None = None,
    on_forced_exit: Callable[[], None] = lambda: None,
) -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM, SIGINT, SIGHUP or the end of the lifeline sets. A second signal exits at once with status
    130.

    `on_hangup` is called on SIGHUP instead of stopping, unless the kernel sent it because the terminal was closed.
    `on_restart` is called before the event is set on SIGUSR2, which means the same as SIGTERM, except that another
    process takes over at once.

    `lifeline` is the read end of a pipe whose other end the parent process holds: end of file means that the parent
    has died. `on_forced_exit` is called right before a forced exit.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    on_signal = functools.partial(_told, [], stop, grace_secs, on_forced_exit)

    # Closing the terminal stops the service too, except under nohup.
    terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN

    def on_sighup(hangup: Callable[[], None]) -> None:
        if terminal and not _has_terminal():
            on_signal("SIGHUP")
            return
        hangup()
        if terminal:  # the kernel merges two pending SIGHUPs: the terminal may close right after this one
            loop.call_later(HANGUP_CHECK_SECS, stop_without_terminal)

    def stop_without_terminal() -> None:
        if not stop.is_set() and not _has_terminal():
            on_signal("SIGHUP")

    numbers = [signal.SIGTERM, signal.SIGINT]
    if on_hangup is not None:
        loop.add_signal_handler(signal.SIGHUP, on_sighup, on_hangup)
    elif signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def on_sigusr2(restart: Callable[[], None]) -> None:
        restart()
        on_signal("SIGUSR2")

    if on_restart is not None:
        loop.add_signal_handler(signal.SIGUSR2, on_sigusr2, on_restart)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number.name)
    if lifeline is not None:
        loop.add_reader(lifeline, _lifeline_ended, loop, lifeline, stop)
    try:
        yield stop
    finally:
        for number in (*numbers, signal.SIGHUP, signal.SIGUSR2):
            loop.remove_signal_handler(number)


def _told(
    signals: list[str], stop: asyncio.Event, grace_secs: float, on_forced_exit: Callable[[], None], name: str
) -> None:
    """A signal has come, after `signals`."""
    signals.append(name)
    if len(signals) > 1:
        log.warning("%s again: exiting immediately", name)
        on_forced_exit()
        os._exit(130)
    log.info("%s: stopping, requests in flight have %g s to finish", name, grace_secs)
    stop.set()


def _has_terminal() -> bool:
    """Whether the process has an open controlling terminal (tty(4))."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _lifeline_ended(loop: asyncio.AbstractEventLoop, lifeline: int, stop: asyncio.Event) -> None:
    loop.remove_reader(lifeline)
    log.info("parent process has died: stopping")
    stop.set()
