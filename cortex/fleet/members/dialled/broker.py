"""Joins cortex's connections to neurons with those that these neurons have opened."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import socket
import ssl
import struct
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Final

from shared.protocol.registration import DIAL_PATH, DIAL_PROTOCOL, NAME_HEADER
from shared.serve import detect_vanished_server
from shared.system.tunnel import BUSY, OK, REFUSED, TunnelEnd
from shared.tasks import TaskSet, timeout

GREETING_SECS: Final = 10.0
"""For TLS and the request of a neuron that connects."""
MAX_GREETINGS: Final = 256
"""At a time. One more ends the oldest: those that do not finish must not keep others out."""
MAX_IDLE: Final = 16
"""Connections of one neuron that wait for a request."""
PING_SECS: Final = 15.0
"""A router forgets a connection that is silent for 30 to 60 s. One whose neuron has not answered by the next time is
dead."""
WAIT_SECS: Final = 4.5
"""How long a request waits for a connection of its neuron, which opens one whenever one was used. Shorter than cortex
waits, which would not learn the reason."""
ASK_SECS: Final = 8.0
"""For all that precedes a request. Longer than cortex waits."""
NO_FILES_SECS: Final = 1.0
"""Pause after the process has run out of file descriptors."""

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid of the process at the other end (unix(7), SO_PEERCRED)

_WELCOME: Final = (
    f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {DIAL_PROTOCOL}\r\n\r\n".encode()
)

log = logging.getLogger(__name__)


class _Refused(Exception):
    """A neuron's connection is not accepted; the message says what to do."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Broker:
    """Owns the connections of neurons. `on_connected` is called when another set of neurons has any."""

    def __init__(self, on_connected: Callable[[list[str]], None]) -> None:
        self._on_connected = on_connected
        self._keys: Mapping[str, str] = {}
        self._open: defaultdict[str, set[TunnelEnd]] = defaultdict(set)  # by name; idle and in use
        self._idle: defaultdict[str, deque[TunnelEnd]] = defaultdict(deque)  # longest idle first
        self._asked: set[TunnelEnd] = set()  # of the idle ones: pinged, and no answer yet
        self._arrived = asyncio.Condition()  # another idle connection, of any neuron
        self._greetings: dict[asyncio.Task[None], None] = {}  # oldest first
        self._tasks = TaskSet()

    def use(self, keys: Mapping[str, str]) -> None:
        """These neurons are registered, with the keys that they must show. Idle connections of others are closed."""
        before, self._keys = self._keys, keys
        for end in [end for name, ends in self._idle.items() if before.get(name) != keys.get(name) for end in ends]:
            end.transport.abort()

    async def accept_neurons(self, listening: socket.socket, tls: Callable[[], ssl.SSLContext | None]) -> None:
        """Accepts the connections of neurons. `tls` is asked for each. Never returns."""
        while True:
            client = await _accepted(listening)
            task = self._tasks.spawn(self._greet(client, tls()), name="connection of a neuron")
            self._greetings[task] = None
            task.add_done_callback(lambda done: self._greetings.pop(done, None))
            if len(self._greetings) > MAX_GREETINGS:
                oldest = next(iter(self._greetings))
                del self._greetings[oldest]
                oldest.cancel()

    async def accept_requests(self, listening: socket.socket) -> None:
        """Accepts the connections of cortex's own processes. Never returns."""
        while True:
            client = await _accepted(listening)
            _, uid, _ = _CREDENTIALS.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            if uid != os.geteuid():
                client.close()
                continue
            _ = self._tasks.spawn(self._serve(client), name="connection to a neuron")

    async def ping_loop(self) -> None:
        """Keeps idle connections open in the routers between, and ends those that do not answer. Never returns."""
        while True:
            await asyncio.sleep(PING_SECS)
            for end in [end for ends in self._idle.values() for end in ends]:
                answer = end.take_arrived()
                if answer.strip(b"\n") or (end in self._asked and not answer):
                    end.transport.abort()
                else:
                    self._asked.add(end)
                    end.say(b"")

    async def close(self) -> None:
        """Ends all connections."""
        await self._tasks.close()
        for end in [end for ends in self._open.values() for end in ends]:
            end.transport.abort()

    async def _greet(self, client: socket.socket, tls: ssl.SSLContext | None) -> None:
        end: TunnelEnd | None = None
        try:
            async with timeout(GREETING_SECS):
                detect_vanished_server(client.fileno())
                end = await _end_of(client, tls)
                name = self._named(await end.read_until(b"\r\n\r\n"))
        except _Refused as error:
            assert end is not None
            end.transport.write(_refusal(error))
            end.transport.close()
        except (asyncio.TimeoutError, OSError) as error:
            log.info("a connection on dial_listen failed: %s", str(error) or f"incomplete after {GREETING_SECS:g} s")
            if end is not None:
                end.transport.abort()
        except BaseException:
            if end is not None:
                end.transport.abort()
            raise
        else:
            if not end.closed:
                end.transport.write(_WELCOME)
                await self._keep(name, end)

    def _named(self, head: bytes) -> str:
        """The name of the neuron that has sent this request. Raises _Refused."""
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if first != f"GET {DIAL_PATH} HTTP/1.1" or fields.get("upgrade", "").lower() != DIAL_PROTOCOL:
            raise _Refused(HTTPStatus.BAD_REQUEST, 'this port is for neurons with dial = "out", not for clients')
        name = fields.get(NAME_HEADER.lower(), "")
        key = self._keys.get(name)
        if key is None:
            raise _Refused(HTTPStatus.NOT_FOUND, f'no neuron {name!r} is registered with dial = "out": register first')
        given = fields.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode("latin-1"), key.encode()):
            raise _Refused(HTTPStatus.UNAUTHORIZED, f"the key is not that of the last registration of {name!r}")
        if len(self._idle.get(name, ())) >= MAX_IDLE:
            raise _Refused(HTTPStatus.CONFLICT, f"{name!r} has {MAX_IDLE} connections that wait for requests already")
        return name

    async def _keep(self, name: str, end: TunnelEnd) -> None:
        end.on_lost = lambda: self._lost(name, end)
        self._open[name].add(end)
        self._idle[name].append(end)
        if len(self._open[name]) == 1:
            self._on_connected(sorted(self._open))
        async with self._arrived:
            self._arrived.notify_all()

    def _lost(self, name: str, end: TunnelEnd) -> None:
        self._asked.discard(end)
        with suppress(ValueError):  # it is in use
            self._idle[name].remove(end)
        self._open[name].discard(end)
        if not self._open[name]:
            del self._open[name], self._idle[name]
            self._on_connected(sorted(self._open))

    async def _serve(self, client: socket.socket) -> None:
        """Joins a connection of cortex with one of the neuron that it names, once that has connected to the port."""
        here: TunnelEnd | None = None
        task = asyncio.current_task()
        assert task is not None
        try:
            async with timeout(ASK_SECS):
                here = await _end_of(client, None)
                here.on_lost = task.cancel  # what it has asked for must not be left open
                name, _, port = (await here.read_until(b"\n")).decode().partition(" ")
                there = await self._at_port(name, port.encode())
        except _NotThere as error:
            assert here is not None
            here.refuse(str(error), error.kind)
        except (asyncio.TimeoutError, asyncio.CancelledError, OSError, UnicodeError) as error:
            if here is not None:
                here.transport.abort()
            if isinstance(error, asyncio.CancelledError):
                raise
        else:
            here.on_lost = None
            here.say(OK)
            here.join(there)

    async def _at_port(self, name: str, port: bytes) -> TunnelEnd:
        """A connection of this neuron that leads to the port now. Raises _NotThere."""
        while True:
            end = await self._taken(name)
            try:
                end.say(port)
                answer = b""
                while not answer:  # an empty line answers a ping
                    answer = await end.read_until(b"\n")
            except ConnectionError:
                continue  # it had ended before the neuron read the question
            except BaseException:
                end.transport.abort()
                raise
            if answer == OK:
                return end
            end.transport.abort()
            kind = BUSY if answer.startswith(BUSY) else REFUSED
            raise _NotThere(answer.removeprefix(kind).decode("utf-8", "replace"), kind)

    async def _taken(self, name: str) -> TunnelEnd:
        """The idle connection of this neuron that has opened last. Raises _NotThere."""
        try:
            async with timeout(WAIT_SECS), self._arrived:
                await self._arrived.wait_for(lambda: bool(self._idle.get(name)))
                end = self._idle[name].pop()
        except asyncio.TimeoutError:
            reason = f"the neuron {name!r} has no free connection to this cortex"
            raise _NotThere(reason, BUSY if name in self._open else REFUSED) from None
        self._asked.discard(end)
        return end


class _NotThere(Exception):
    """A port cannot be connected to. The message says why, `kind` (REFUSED or BUSY) whether to try again."""

    def __init__(self, reason: str, kind: bytes) -> None:
        super().__init__(reason)
        self.kind = kind


async def _accepted(listening: socket.socket) -> socket.socket:
    """The next client. Waits while the process has no file descriptor for it."""
    while True:
        try:
            client, _ = await asyncio.get_running_loop().sock_accept(listening)
        except OSError as error:
            log.warning("cannot accept a connection: %s", error.strerror)
            await asyncio.sleep(NO_FILES_SECS)
        else:
            return client


async def _end_of(client: socket.socket, tls: ssl.SSLContext | None) -> TunnelEnd:
    """The socket as a tunnel's end, after the TLS handshake. Closes it if that fails."""
    client.setblocking(False)
    end = TunnelEnd()
    try:  # with TLS, uvloop returns a protocol of its own
        _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: end, client, ssl=tls)
    except BaseException:
        client.close()
        raise
    return end


def _refusal(error: _Refused) -> bytes:
    body = json.dumps({"error": {"message": str(error)}}).encode()
    status = error.status
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
