"""Requests of web pages: refused (`shared.cross_site`), or allowed and told so (CORS). Pure."""

from __future__ import annotations

from typing import Final

from cortex.http.request import Request
from cortex.proxy.paths import SIGN_IN_PAGES
from shared.cross_site import CrossSitePolicy, Sender, is_other_page, refused_sender
from shared.errors import ServiceError

_MAX_ACCEPTED: Final = 1024
_MAX_BYTES: Final = 256
_EXPOSED: Final = b"x-request-id, request-id, x-cortex-node, x-cortex-cold-start, x-should-retry, retry-after"

_Headers = tuple[bytes | None, bytes | None, bytes | None]


class CrossSiteCheck:
    """Remembers the senders that were accepted: a client sends the same headers each time, and looking them up costs a
    fraction of the decision. Bounded, as clients choose them."""

    __slots__ = ("_accepted", "_hosts", "_policy")

    def __init__(self, policy: CrossSitePolicy) -> None:
        self._policy = policy
        self._accepted: set[_Headers] = set()
        self._hosts: set[bytes | None] = set()  # of those that sent neither of the other headers

    def refusal(self, request: Request) -> ServiceError | None:
        """Why the request is refused; None if it is not."""
        if request.origin is None and request.fetch_site is None and request.host in self._hosts:
            return None  # nearly every request: no browser sent it
        if request.origin is None and request.method == b"GET" and request.path in SIGN_IN_PAGES:
            return refused_sender(Sender(_text(request.host), None, None), self._policy)
        headers = request.host, request.origin, request.fetch_site
        if headers in self._accepted:
            return None
        error = refused_sender(Sender(*map(_text, headers)), self._policy)
        if error is None and sum(len(value) for value in headers if value is not None) <= _MAX_BYTES:
            if len(self._accepted) >= _MAX_ACCEPTED:
                self._accepted.clear()
                self._hosts.clear()
            self._accepted.add(headers)
            if request.origin is None and request.fetch_site is None:
                self._hosts.add(request.host)
        return error


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def is_of_other_page(request: Request) -> bool:
    """True for a request of a page that is not cortex's own."""
    return is_other_page(Sender(*map(_text, (request.host, request.origin, request.fetch_site))))


def allowed_page(origin: bytes, origins: frozenset[str]) -> bytes:
    """The header lines that let a page of this origin read an answer; b"" if it may not."""
    shown = b"*" if "*" in origins else origin
    if shown is origin and _text(origin.lower()) not in origins:
        return b""
    return b"access-control-allow-origin: %b\r\nvary: Origin\r\naccess-control-expose-headers: %b" % (shown, _EXPOSED)


def preflight_answer(request: Request) -> bytes:
    """The answer to a browser that asks whether a page may send a request, without what every answer has."""
    lines = [
        b"HTTP/1.1 204 No Content",
        b"access-control-allow-methods: GET, POST, DELETE, OPTIONS",
        b"access-control-allow-headers: " + (request.passed_value(b"access-control-request-headers") or b"*"),
        b"access-control-max-age: 600",
    ]
    if request.passed_value(b"access-control-request-private-network") is not None:
        lines.append(b"access-control-allow-private-network: true")
    return b"\r\n".join(lines)
