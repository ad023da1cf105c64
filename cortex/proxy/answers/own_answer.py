"""Requests that a worker answers at once by itself."""

from __future__ import annotations

from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.proxy.answers.answer import own_lines
from shared.errors import ServiceError
from shared.request_ids import request_id as make_request_id


class _Immediate:
    """Implements `http.connection.Handler`; subclasses answer in `begin`, so nothing is under way afterwards."""

    __slots__ = ()

    def abandon(self) -> None:
        """The answer is written already."""

    def tick(self, now: float) -> None:
        """The answer is written already."""

    def stop(self) -> None:
        """The answer is written already."""

    def pause(self) -> None:
        """The answer is written already."""

    def resume(self) -> None:
        """The answer is written already."""


class RefusedRequest(_Immediate):
    """A complete request that gets an error."""

    __slots__ = ("_client", "_error", "_request_id")

    def __init__(self, client: ClientConnection, error: ServiceError, request_id: str) -> None:
        self._client = client
        self._error = error
        self._request_id = request_id

    def begin(self) -> None:
        self._client.refuse(self._error, self._request_id)


class OwnAnswer(_Immediate):
    """A request that gets a head of cortex's without a body: `head` without the final CRLF, and the lines that every
    answer has."""

    __slots__ = ("_client", "_head", "_request")

    def __init__(self, client: ClientConnection, request: Request, head: bytes) -> None:
        self._client = client
        self._request = request
        self._head = head

    def begin(self) -> None:
        request, client = self._request, self._client
        request.keep_alive = request.keep_alive and not client.draining
        lines = [self._head, own_lines(request, make_request_id(request.request_id).encode())]
        if not request.keep_alive:
            lines.append(b"connection: close")
        elif not request.modern:
            lines.append(b"connection: keep-alive")
        client.transport.write(b"\r\n".join([*lines, b"", b""]))
        client.finished()
