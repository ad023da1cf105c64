"""Request and response heads: read by llhttp in its strict mode, each header looked at once."""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

import httptools

from cortex.http.headers import CONNECTION, OF_REQUESTS, OF_RESPONSES, Names, without_named

MAX_HEAD_BYTES: Final = 65536
MAX_HEADERS: Final = 256

_SEPARATOR: Final = b"\r\n\r\n"
_USUAL_CONNECTION: Final = frozenset({b"keep-alive", b"close", b"Keep-Alive", b"Close"})


class BadHead(Exception):
    """A head that is refused; `status` is what a client is told."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Head:
    """A head, and what llhttp calls back while it reads one; both kinds have this in common.

    `passed` are the header lines that go on, as they came, without their ends; `named` are the values of those that
    mean something here, several of one name joined by commas.
    """

    __slots__ = ("complete", "keep_alive", "named", "parser", "passed", "version")

    names: Names

    def __init__(self) -> None:
        self.complete = False
        self.parser: Any = None  # while the head is read

    def on_headers_complete(self) -> None:
        self.complete = True
        self.keep_alive: bool = self.parser.should_keep_alive()  # here: where no body follows, llhttp then forgets it

    def take(self, lines: list[bytes]) -> None:
        """Sorts the lines of a head that llhttp has found good: none is folded, each has a name and a colon.

        Raises:
            BadHead: there are too many, or the first is not what it should be.
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
    """`target` is the request line's, as it came."""

    __slots__ = ("method", "target")

    names = OF_REQUESTS

    def take_first(self, line: bytes) -> None:
        parts = line.split(b" ")
        if len(parts) != 3:
            raise BadHead("the request line has three words")
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
    """Reads one head from pieces of any size. llhttp and the search for the empty line must agree on where it ends."""

    __slots__ = ("_head", "_pieces", "_size")

    def __init__(self, head: Head, parser: Any) -> None:
        """`parser` is llhttp's for this kind of head, and calls `head` back."""
        head.parser = parser
        self._head = head
        self._pieces: list[bytes] = []  # until it is whole
        self._size = 0

    @property
    def begun(self) -> bool:
        return self._size > 0

    def feed(self, data: bytes) -> bytes | None:
        """What comes behind the head, None while it is not whole.

        Raises:
            BadHead: it breaks the grammar, or is too long.
        """
        before = b"" if not self._size else b"".join(self._pieces[-3:])[-3:]  # the empty line may be cut
        end = (before + data).find(_SEPARATOR) + 4 - len(before) if before else data.find(_SEPARATOR) + 4
        whole = end > 3 - len(before)
        piece = data[:end] if whole else data
        self._size += len(piece)
        if self._size > MAX_HEAD_BYTES:
            raise BadHead(f"the head is longer than {MAX_HEAD_BYTES} bytes", 431)
        head = self._head
        try:
            head.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            pass  # nothing is upgraded here: the request is answered as if it had not asked
        except httptools.HttpParserError as error:
            raise BadHead(str(error)) from error
        if head.complete != whole:
            raise BadHead("the end of the head is not clear")
        if not whole:
            self._pieces.append(piece)
            return None
        if self._pieces:
            piece = b"".join((*self._pieces, piece))
        head.take(piece[:-4].split(b"\r\n"))
        return data[end:]


def request_reader() -> tuple[RequestHead, HeadReader]:
    """A request's head, and its reader."""
    head = RequestHead()
    return head, HeadReader(head, httptools.HttpRequestParser(head))


def response_reader() -> tuple[ResponseHead, HeadReader]:
    """A response's head, and its reader."""
    head = ResponseHead()
    return head, HeadReader(head, httptools.HttpResponseParser(head))
