"""Accepts clients of a TLS port. Handshakes are limited in time and number; HTTP without TLS gets a clear answer."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Final

from cortex.http.connection import UNREAD_SECS, Dispatcher
from cortex.http.responses import error_answer
from shared.errors import InvalidRequest
from shared.serve import BACKLOG
from shared.tasks import TaskSet, timeout
from shared.tls import RenewedContext

log = logging.getLogger(__name__)

HANDSHAKE_SECS = 10.0
"""From a client's connection to the end of its handshake."""
MAX_HANDSHAKES = 512
"""At a time in this process. One more ends the oldest: clients that do not finish must not keep others out."""
GRACE_SECS = 1.0
"""What every client has for its handshake, however many others connect meanwhile. These wait in the kernel."""
LAST_WORD_SECS = 1.0
"""How long a client without TLS has to read its answer."""
READ_BYTES = 65536
NO_FILES_SECS = 1.0
"""Pause after the process has run out of file descriptors, as in asyncio."""

_HANDSHAKE_RECORD: Final = 22  # the first byte of a TLS connection, RFC 8446, section 5.1
_OUT_OF_FILES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class TlsListener:
    """Clients of one listening socket. `accept` makes the protocol of each; `tls` is asked at each handshake."""

    def __init__(
        self, sock: socket.socket, dispatcher: Dispatcher, accept: Callable[[], asyncio.Protocol], tls: RenewedContext
    ) -> None:
        """Accepts from now on, until `close`."""
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._dispatcher = dispatcher
        self._accept = accept
        self._tls = tls
        self._tasks = TaskSet()
        self._opening: dict[asyncio.Task[None], float] = {}  # since when, oldest first
        self._full = False
        self._resuming: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._loop.add_reader(sock, self._ready)

    async def close(self) -> None:
        """Accepts no more, and ends the handshakes that are not complete."""
        self._full = False
        self._stop_accepting()
        self._sock.close()
        await self._tasks.close()

    def _ready(self) -> None:
        for _ in range(BACKLOG):
            grace = self._grace()
            if grace > 0:
                self._full = True
                self._pause(grace)
                return
            try:
                client, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_FILES:
                    raise
                log.warning("cannot accept a client: %s", error.strerror)
                self._pause(NO_FILES_SECS)
                return
            client.setblocking(False)
            task = self._tasks.spawn(self._open(client, str(address[0])), name="TLS handshake")
            self._opening[task] = self._loop.time()
            task.add_done_callback(self._opened)
            if len(self._opening) > MAX_HANDSHAKES:
                oldest = next(iter(self._opening))
                del self._opening[oldest]
                oldest.cancel()

    def _grace(self) -> float:
        """Seconds until one more client may end the oldest handshake."""
        if len(self._opening) < MAX_HANDSHAKES:
            return 0.0
        return next(iter(self._opening.values())) + GRACE_SECS - self._loop.time()

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.pop(task, None)
        if self._full:
            self._resume()

    def _pause(self, secs: float) -> None:
        self._stop_accepting()
        self._resuming = self._loop.call_later(secs, self._resume)

    def _resume(self) -> None:
        self._full = False
        self._stop_accepting()
        self._loop.add_reader(self._sock, self._ready)

    def _stop_accepting(self) -> None:
        self._loop.remove_reader(self._sock)
        if self._resuming is not None:
            self._resuming.cancel()

    async def _open(self, client: socket.socket, peer: str) -> None:
        """Hands the client over once its handshake is complete, and closes it in every other case."""
        handed_over = False
        try:
            async with timeout(HANDSHAKE_SECS):
                first = await self._first_byte(client)
                handed_over = first == _HANDSHAKE_RECORD
                if handed_over:  # from here on asyncio closes it
                    await self._loop.connect_accepted_socket(
                        self._accept,
                        client,
                        ssl=self._tls.current,
                        ssl_shutdown_timeout=UNREAD_SECS,
                    )
                elif first is not None:
                    await self._refuse(client, first)
        except (asyncio.TimeoutError, TimeoutError):  # two classes before Python 3.11
            log.info("TLS handshake with %s: not complete within %g s", peer, HANDSHAKE_SECS)
        except OSError as error:
            log.info("TLS handshake with %s failed: %s", peer, getattr(error, "reason", None) or error)
        finally:
            if not handed_over:
                client.close()

    async def _first_byte(self, client: socket.socket) -> int | None:
        """Waits for it and leaves it in the socket; None if the client disconnects instead."""
        arrived: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(client, _set, arrived)
        try:
            await arrived
        finally:
            self._loop.remove_reader(client)
        first = client.recv(1, socket.MSG_PEEK)
        return first[0] if first else None

    async def _refuse(self, client: socket.socket, first: int) -> None:
        """Answers HTTP without TLS. Reads on until the client disconnects: closing at once would discard the answer."""
        if not chr(first).isupper():  # no method begins like this
            return
        error = InvalidRequest("this port speaks TLS: use https:// instead of http://")
        answer = error_answer(error, self._dispatcher.rejected(None, error), request=None, keep_alive=False)
        async with timeout(LAST_WORD_SECS):
            await self._loop.sock_sendall(client, answer)
            client.shutdown(socket.SHUT_WR)
            while await self._loop.sock_recv(client, READ_BYTES):
                pass


def _set(arrived: asyncio.Future[None]) -> None:
    if not arrived.done():
        arrived.set_result(None)
