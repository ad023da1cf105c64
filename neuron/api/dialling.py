"""The connections that a neuron with `dial = "out"` keeps to a cortex, and what cortex reaches through them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import ssl
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from shared.protocol import DialReply, RegistrationReply
from shared.protocol.registration import DIAL_PATH, DIAL_PROTOCOL, NAME_HEADER
from shared.serve import UNANSWERED_CHECK_SECS, detect_vanished_clients, is_unanswered
from shared.system.tunnel import BUSY, OK, TunnelEnd
from shared.tasks import TaskSet, cancel_all, keep_running, timeout
from shared.tls import TlsError

IDLE_CONNECTIONS: Final = 8
"""Kept for requests to come. One more is opened for each that is used, which takes two round trips, three with TLS: at
100 ms about 40 connections a second, without TLS."""
GREETING_SECS: Final = 10.0
"""From the connection to cortex's answer."""
SILENCE_SECS: Final = 45.0
"""cortex asks every 15 s on an idle connection: after this long without a question it is dead."""
CONNECT_SECS: Final = 4.0
"""For a connection to an engine. cortex waits a little longer."""
RETRY_SECS: Final = 1.0
_SHOWN_CHARS: Final = 500
"""Of an answer that is not an error of cortex."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets:
    """What cortex may connect to on this host: neuron itself, and the engines that it runs. `host` is that of
    neuron.toml, which all of them bind."""

    host: str
    port: int
    engine_ports: Callable[[], Collection[int]]

    def address(self, port: int) -> tuple[str, int] | None:
        """Where to connect for a port that cortex asks for, 0 for neuron's own; None if it is neither."""
        if port not in (0, self.port) and port not in self.engine_ports():
            return None
        return _LOOPBACK.get(self.host, self.host), port or self.port


_LOOPBACK: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound


class Dialler:
    """Keeps connections to the cortex at `url`. Uses `tls` for its certificate if that is an https URL."""

    def __init__(self, url: str, name: str, targets: Targets, tls: Callable[[], ssl.SSLContext]) -> None:
        self._url = url
        self._name = name
        self._targets = targets
        self._tls = tls
        self._offer: DialReply | None = None
        self._offered = asyncio.Event()
        self._context: ssl.SSLContext | None = None  # made again after each registration: its file may be new
        self._problem: str | None = None  # the last one that was logged
        self._streams = TaskSet()
        self._joined: set[TunnelEnd] = set()  # the ends towards cortex

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connections are kept inside the body, from the first reply on."""
        name = f"connections to {self._url}"
        work = [*[self._keep_one] * IDLE_CONNECTIONS, self._end_unanswered]
        loops = [asyncio.create_task(keep_running(name, each), name=name) for each in work]
        try:
            yield
        finally:
            await cancel_all(loops)
            await self._streams.close()
            for end in list(self._joined):
                end.transport.abort()

    def use(self, reply: RegistrationReply) -> None:
        """What cortex has said to the last registration."""
        self._offer, self._context = reply.dial, None
        if reply.dial is None:
            self._report("it did not say where to connect to: it may be older than this neuron")
            self._offered.clear()
        else:
            self._offered.set()

    async def _keep_one(self) -> None:
        """Keeps one idle connection. Never returns."""
        while True:
            await self._offered.wait()
            try:
                end = await self._connection()
            except (OSError, ValueError, TlsError, asyncio.TimeoutError) as error:
                self._report(str(error) or f"no answer within {GREETING_SECS:g} s")
                await _pause()
                continue
            self._report(None)
            try:
                port = await _asked_port(end)
            except (ConnectionError, ValueError, asyncio.TimeoutError):
                end.transport.abort()
                await _pause()
            except asyncio.CancelledError:
                end.transport.abort()
                raise
            else:
                _ = self._streams.spawn(self._lead(end, port), name=f"connection of cortex to port {port}")

    async def _connection(self) -> TunnelEnd:
        """A new connection that cortex has accepted. Raises OSError, TlsError, ValueError or asyncio.TimeoutError."""
        offer = self._offer
        assert offer is not None
        parts = urlsplit(self._url)
        host = parts.hostname or ""
        if parts.scheme == "https" and not offer.tls:
            raise ValueError(
                "its port for connections of neurons does not speak TLS, although its URL is https: set [gateway] "
                "tls_cert in cortex.toml"
            )
        tls = await self._tls_context() if offer.tls else None
        async with timeout(GREETING_SECS):
            end = TunnelEnd()
            _ = await asyncio.get_running_loop().create_connection(
                lambda: end, host, offer.port, ssl=tls, server_hostname=None if tls is None else host
            )
            try:
                detect_vanished_clients(end.transport.get_extra_info("socket"))
                end.transport.write(_request(host, self._name, offer.key))
                head = await end.read_until(b"\r\n\r\n")
                if head.split()[1:2] != [b"101"]:
                    with contextlib.suppress(ConnectionError):  # how the answer ends
                        await end.read_until(b"\0")
                    raise ValueError(shown(end.take_arrived()))
            except BaseException:
                end.transport.abort()
                raise
        return end

    async def _tls_context(self) -> ssl.SSLContext:
        made = self._context
        if made is None:
            made = self._context = await asyncio.to_thread(self._tls)
        return made

    async def _lead(self, end: TunnelEnd, port: int) -> None:
        """Connects cortex to the port that it has asked for."""
        address = self._targets.address(port)
        if address is None:
            log.warning("cortex at %s asked for port %d, which no engine of this neuron has: refused", self._url, port)
            end.refuse(f"port {port} is not one of neuron's engines")
            return
        try:
            async with timeout(CONNECT_SECS):
                _, there = await asyncio.get_running_loop().create_connection(TunnelEnd, *address)
        except (asyncio.TimeoutError, TimeoutError):  # two classes before Python 3.11; the second is an OSError
            end.refuse(f"port {port or self._targets.port} has not answered within {CONNECT_SECS:g} s", BUSY)
            return
        except OSError as error:
            end.refuse(f"connection refused: nothing answers on port {port or self._targets.port}: {error}")
            return
        except asyncio.CancelledError:
            end.transport.abort()
            raise
        end.say(OK)
        if not end.closed:
            self._joined.add(end)
            end.on_lost = lambda: self._joined.discard(end)
        end.join(there)

    async def _end_unanswered(self) -> None:
        """Ends the streams of a cortex that has vanished, so that the engines stop: its kernel acknowledges nothing.
        Never returns."""
        before: set[TunnelEnd] = set()
        while True:
            await asyncio.sleep(UNANSWERED_CHECK_SECS)
            now = {end for end in self._joined if is_unanswered(end.transport.get_extra_info("socket"))}
            for end in now & before:
                log.warning("cortex at %s no longer answers on a connection: closed", self._url)
                end.transport.abort()
            before = now

    def _report(self, problem: str | None) -> None:
        if problem == self._problem:
            return
        self._problem = problem
        if problem is None:
            log.info("connected to cortex at %s", self._url)
        else:
            log.warning("cannot keep connections to cortex at %s: %s", self._url, problem)


def _request(host: str, name: str, key: str) -> bytes:
    lines = (
        f"GET {DIAL_PATH} HTTP/1.1",
        f"Host: {host}",
        "Connection: Upgrade",
        f"Upgrade: {DIAL_PROTOCOL}",
        f"Authorization: Bearer {key}",
        f"{NAME_HEADER}: {name}",
    )
    return "\r\n".join((*lines, "", "")).encode()


def shown(body: bytes) -> str:
    """What a refusal says: the message of cortex's error, or the beginning of another server's answer."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body.decode("utf-8", "replace")[:_SHOWN_CHARS]


async def _asked_port(end: TunnelEnd) -> int:
    """The port that cortex wants to reach. Raises ConnectionError, ValueError or asyncio.TimeoutError."""
    while True:
        async with timeout(SILENCE_SECS):
            asked = await end.read_until(b"\n")
        if asked:
            return int(asked)
        end.say(b"")


async def _pause() -> None:
    await asyncio.sleep(RETRY_SECS * random.uniform(0.5, 1.5))  # noqa: S311 - spreads load
