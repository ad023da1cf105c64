"""Request and response heads: read by llhttp in its strict mode, each header classified once."""

from __future__ import annotations

from typing import Any

import httptools

MAX_HEAD_BYTES = 65536
MAX_HEADERS = 256

_SEPARATOR = b"\r\n\r\n"


class BadHead(Exception):
    """A head that is refused; `status` is what a client is told."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class _Head:
    """What llhttp calls back for both kinds. Names and values are the bytes that came."""

    __slots__ = ("complete", "headers", "keep_alive", "parser")

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        self.keep_alive = False
        self.parser: Any = None  # while the head is read

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.complete = True
        self.keep_alive = self.parser.should_keep_alive()  # asked here: where no body follows, llhttp then forgets it


class RequestHead(_Head):
    """`target` is the request line's, as it came."""

    __slots__ = ("method", "target", "version")

    def __init__(self) -> None:
        super().__init__()
        self.target = b""
        self.method = b""
        self.version = ""

    def on_url(self, url: bytes) -> None:
        self.target += url


class ResponseHead(_Head):
    """`reason` may be empty."""

    __slots__ = ("reason", "status", "version")

    def __init__(self) -> None:
        super().__init__()
        self.status = 0
        self.reason = b""
        self.version = ""

    def on_status(self, reason: bytes) -> None:
        self.reason += reason


class RequestReader:
    """Reads one request head from pieces of any size."""

    __slots__ = ("_parser", "_reading", "head")

    def __init__(self) -> None:
        self.head = RequestHead()
        self._parser = self.head.parser = httptools.HttpRequestParser(self.head)
        self._reading = _Reading()

    def feed(self, data: bytes) -> bytes | None:
        """What comes behind the head, None while it is not whole.

        Raises:
            BadHead: it breaks the grammar, or is too long.
        """
        if not self._reading.size:
            data = data.lstrip(b"\r\n")  # RFC 9112, section 2.2: empty lines before a request are ignored
            if not data:
                return None
        rest = self._reading.feed(self._parser, self.head, data)
        if rest is not None:
            self.head.method = self._parser.get_method()
            self.head.version = self._parser.get_http_version()
            self.head.parser = None
        return rest

    @property
    def begun(self) -> bool:
        return self._reading.size > 0


class ResponseReader:
    """Reads one response head from pieces of any size."""

    __slots__ = ("_parser", "_reading", "head")

    def __init__(self) -> None:
        self.head = ResponseHead()
        self._parser = self.head.parser = httptools.HttpResponseParser(self.head)
        self._reading = _Reading()

    def feed(self, data: bytes) -> bytes | None:
        """As RequestReader.feed."""
        rest = self._reading.feed(self._parser, self.head, data)
        if rest is not None:
            self.head.status = self._parser.get_status_code()
            self.head.version = self._parser.get_http_version()
            self.head.parser = None
        return rest

    @property
    def begun(self) -> bool:
        return self._reading.size > 0


class _Reading:
    """Cuts the head off what comes. llhttp and the search for the empty line must agree on where it ends."""

    __slots__ = ("last", "size")

    def __init__(self) -> None:
        self.size = 0  # bytes of the head so far
        self.last = b""  # its last three bytes: the empty line may be cut

    def feed(self, parser: Any, head: _Head, data: bytes) -> bytes | None:
        window = self.last + data if self.last else data
        found = window.find(_SEPARATOR)
        if found < 0:
            piece, rest = data, None
            self.last = window[-3:]
        else:
            cut = found + 4 - len(self.last)
            piece, rest = data[:cut], data[cut:]
        self.size += len(piece)
        if self.size > MAX_HEAD_BYTES:
            raise BadHead(f"the head is longer than {MAX_HEAD_BYTES} bytes", 431)
        try:
            parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            pass  # nothing is upgraded here: the request is answered as if it had not asked
        except httptools.HttpParserError as error:
            raise BadHead(str(error)) from error
        if head.complete != (rest is not None):
            raise BadHead("the end of the head is not clear")
        if len(head.headers) > MAX_HEADERS:
            raise BadHead(f"more than {MAX_HEADERS} headers", 431)
        return rest
