"""`shared.cross_site` for requests as they come from a socket."""

from __future__ import annotations

from typing import Final

from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from shared.cross_site import CrossSitePolicy, Sender, refused_sender
from shared.errors import ServiceError

_MAX_ACCEPTED: Final = 1024
_MAX_BYTES: Final = 256

_Headers = tuple[bytes | None, bytes | None, bytes | None]


class CrossSiteCheck:
    """Remembers the senders that were accepted: a client sends the same headers each time, and looking them up costs a
    fraction of the decision. Bounded, as clients choose them."""

    __slots__ = ("_accepted", "_policy")

    def __init__(self, policy: CrossSitePolicy) -> None:
        self._policy = policy
        self._accepted: set[_Headers] = set()

    def refusal(self, request: Request) -> ServiceError | None:
        """Why the request is refused; None if it is not."""
        headers = request.host, request.origin, request.fetch_site
        if headers in self._accepted:
            return None
        error = refused_sender(Sender(*map(_text, headers)), self._policy)
        if error is None and sum(len(value) for value in headers if value is not None) <= _MAX_BYTES:
            if len(self._accepted) >= _MAX_ACCEPTED:
                self._accepted.clear()
            self._accepted.add(headers)
        return error


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


class RefusedRequest:
    """A complete request that is answered with an error at once. Implements `http.connection.Handler`."""

    __slots__ = ("_client", "_error", "_request_id")

    def __init__(self, client: ClientConnection, error: ServiceError, request_id: str) -> None:
        self._client = client
        self._error = error
        self._request_id = request_id

    def begin(self) -> None:
        self._client.refuse(self._error, self._request_id)

    def abandon(self) -> None:
        """Nothing is under way: `begin` has answered."""

    def stop(self) -> None:
        """Nothing is under way: `begin` has answered."""

    def pause(self) -> None:
        """Nothing is under way: `begin` has answered."""

    def resume(self) -> None:
        """Nothing is under way: `begin` has answered."""

    def tick(self, now: float) -> None:
        """Nothing is under way: `begin` has answered."""
