"""Request and response heads: llhttp checks them in strict mode, then one pass sorts the headers. No I/O."""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

import httptools

from cortex.http.headers import CONNECTION, OF_REQUESTS, OF_RESPONSES, Names, without_named

MAX_HEAD_BYTES: Final = 65536
MAX_HEADERS: Final = 256

_SEPARATOR: Final = b"\r\n\r\n"
_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\n"
_USUAL_CONNECTION: Final = frozenset({b"keep-alive", b"close", b"Keep-Alive", b"Close"})


class BadHead(Exception):
    """An invalid or unsupported head; `status` is the HTTP status for the client."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Head:
    """The common part of request and response heads. Also receives llhttp's callbacks.

    `passed`: the header lines to pass on unchanged, without CRLF. `named`: the values of the headers that cortex reads
    itself, by the constants of `headers`; several of one name are joined with commas.
    """

    __slots__ = ("complete", "keep_alive", "named", "parser", "passed", "version")

    names: Names

    def __init__(self) -> None:
        self.complete = False
        self.parser: Any = None  # only while the head is being read

    def on_headers_complete(self) -> None:
        self.complete = True
        self.keep_alive: bool = self.parser.should_keep_alive()  # must be asked here: without a body, llhttp resets it

    def take(self, lines: list[bytes]) -> None:
        """Sorts the lines of a head that llhttp has accepted: none is folded, each has a name and a colon.

        Raises:
            BadHead: too many headers, or a malformed request line.
        """
        self.parser = None
        if len(lines) > MAX_HEADERS:
            raise BadHead(f"more than {MAX_HEADERS} headers", 431)
        self.take_first(lines[0])
        names = self.names
        passed: list[bytes] = []
        named: dict[int, bytes] = {}
        for line in islice(lines, 1, None):
            meaning, value = names[line]
            if not meaning:
                passed.append(line)
            elif meaning in named:
                named[meaning] += b", " + value
            else:
                named[meaning] = value
        connection = named.get(CONNECTION)
        if connection is not None and connection not in _USUAL_CONNECTION:
            passed = without_named(passed, connection)
        self.passed = passed
        self.named = named

    def take_first(self, line: bytes) -> None:
        raise NotImplementedError


class RequestHead(Head):
    """`target` is the request line's, unchanged."""

    __slots__ = ("method", "target")

    names = OF_REQUESTS

    def take_first(self, line: bytes) -> None:
        parts = line.split(b" ")
        if len(parts) != 3:
            raise BadHead("malformed request line")
        self.method, self.target, self.version = parts


class ResponseHead(Head):
    """`reason` may be empty."""

    __slots__ = ("reason", "status")

    names = OF_RESPONSES

    def take_first(self, line: bytes) -> None:
        self.version = line[:8]
        self.status = int(line[9:12])
        self.reason = line[13:]


class HeadReader:
    """Reads one head from pieces of any size. llhttp and the search for the empty line must agree on its end."""

    __slots__ = ("_head", "_pieces", "_size")

    def __init__(self, head: Head, parser: Any) -> None:
        """`parser` is llhttp's for this kind of head, with `head` as its callbacks."""
        head.parser = parser
        self._head = head
        self._pieces: list[bytes] = []  # until the head is complete
        self._size = 0

    @property
    def begun(self) -> bool:
        return self._size > 0

    def feed(self, data: bytes) -> bytes | None:
        """Takes the next bytes. Returns those after the head, None while the head is incomplete.

        Raises:
            BadHead: it is malformed or too long.
        """
        if self._size:  # the empty line may be split over two pieces
            before = b"".join(self._pieces[-3:])[-3:]
            end = (before + data).find(_SEPARATOR) + 4 - len(before)
            whole = end > 3 - len(before)
        else:
            end = data.find(_SEPARATOR) + 4
            whole = end > 3
        piece = data[:end] if whole else data
        self._size += len(piece)
        if self._size > MAX_HEAD_BYTES:
            raise BadHead(f"the request head exceeds {MAX_HEAD_BYTES} bytes", 431)
        head = self._head
        try:
            head.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            pass  # we do not upgrade: handle it as an ordinary request
        except httptools.HttpParserError as error:
            raise self._malformed(piece, str(error)) from error
        if head.complete != whole:
            raise self._malformed(piece, "ambiguous end of the request head")
        if not whole:
            self._pieces.append(piece)
            return None
        if self._pieces:
            piece = b"".join((*self._pieces, piece))
        head.take(piece[:-4].split(b"\r\n"))
        return data[end:]

    def _malformed(self, piece: bytes, reason: str) -> BadHead:
        if b"".join((*self._pieces, piece)).startswith(_HTTP2_PREFACE):
            return BadHead("HTTP/2 is not supported, use HTTP/1.1", 505)
        return BadHead(reason)


def request_reader() -> tuple[RequestHead, HeadReader]:
    """An empty request head and its reader."""
    head = RequestHead()
    return head, HeadReader(head, httptools.HttpRequestParser(head))


def response_reader() -> tuple[ResponseHead, HeadReader]:
    """An empty response head and its reader."""
    head = ResponseHead()
    return head, HeadReader(head, httptools.HttpResponseParser(head))
