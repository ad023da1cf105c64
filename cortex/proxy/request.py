"""A request as the proxy works on it, and the head that an engine gets."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from cortex.http1.heads import BadHead, RequestHead
from cortex.proxy.headers import RequestHeaders

_AUTHORITY = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)


class Request:
    """A whole request: head, headers and, once it has come, its body.

    `target` is path and query as they came, without scheme and authority; `path` is without the query and unquoted.
    """

    __slots__ = ("body", "headers", "keep_alive", "method", "path", "peer", "received", "target", "version")

    def __init__(self, head: RequestHead, *, peer: str, received: float) -> None:
        """`received` is monotonic seconds.

        Raises:
            BadHead: the head is well-formed and yet not to be served.
        """
        if head.version not in ("1.0", "1.1"):
            raise BadHead(f"HTTP/{head.version} is not spoken here", 505)
        self.headers = RequestHeaders(head)
        self.method = head.method
        self.version = head.version
        self.keep_alive = head.keep_alive
        self.peer = peer
        self.received = received
        self.body = b""
        self.target = target = _path_of(head)
        path = target.partition(b"?")[0]
        self.path = unquote_to_bytes(path) if b"%" in path else path

    def head_for(self, host: bytes, prefix: bytes, request_id: bytes, credentials: bytes) -> bytes:
        """The head of this request for an engine at `host`, below the path `prefix`. `credentials` are whole header
        lines."""
        headers = self.headers
        given = headers.forwarded_for
        forwarded = self.peer.encode("ascii", "replace") if given is None else b"%b, %b" % (given, self.peer.encode())
        return (
            b"%b %b%b HTTP/1.1\r\nhost: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\nx-forwarded-for: %b\r\n%b%b\r\n"
            % (
                self.method,
                prefix,
                self.target,
                host,
                len(self.body),
                request_id,
                forwarded,
                credentials,
                headers.passed,
            )
        )


def _path_of(head: RequestHead) -> bytes:
    target = head.target
    if target[:1] == b"/":
        return target
    match = _AUTHORITY.match(target)
    if match is not None:  # a request line may hold a whole URL
        rest = target[match.end() :]
        return rest if rest[:1] == b"/" else b"/" + rest
    if target == b"*" and head.method == b"OPTIONS":
        return target
    raise BadHead(f"not a request target: {target[:64]!r}")
