"""Which headers pass the proxy. Pure."""

from __future__ import annotations

from enum import IntEnum

from cortex.http1.heads import BadHead, RequestHead, ResponseHead

Headers = list[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""RFC 9110, section 7.6.1: they belong to one connection, as does whatever `Connection` names."""


class Name(IntEnum):
    """What a header's name means to the proxy. PASS: nothing, it goes on as it came."""

    PASS = 0
    DROP = 1
    HOST = 2
    CONTENT_LENGTH = 3
    CONTENT_TYPE = 4
    CONTENT_ENCODING = 5
    TRANSFER_ENCODING = 6
    CONNECTION = 7
    AUTHORIZATION = 8
    API_KEY = 9
    EXPECT = 10
    REQUEST_ID = 11
    FORWARDED_FOR = 12
    COOKIE = 13


_OF_REQUESTS = {
    **dict.fromkeys(HOP_BY_HOP, Name.DROP),
    b"cookie": Name.COOKIE,
    b"host": Name.HOST,
    b"content-length": Name.CONTENT_LENGTH,
    b"content-type": Name.CONTENT_TYPE,
    b"content-encoding": Name.CONTENT_ENCODING,
    b"transfer-encoding": Name.TRANSFER_ENCODING,
    b"connection": Name.CONNECTION,
    b"authorization": Name.AUTHORIZATION,
    b"x-api-key": Name.API_KEY,
    b"expect": Name.EXPECT,
    b"x-request-id": Name.REQUEST_ID,
    b"x-forwarded-for": Name.FORWARDED_FOR,
}
_OF_RESPONSES = {
    **dict.fromkeys(HOP_BY_HOP, Name.DROP),
    b"content-length": Name.CONTENT_LENGTH,
    b"content-type": Name.CONTENT_TYPE,
    b"content-encoding": Name.CONTENT_ENCODING,
    b"transfer-encoding": Name.TRANSFER_ENCODING,
    b"connection": Name.CONNECTION,
    b"x-request-id": Name.DROP,
    b"x-cortex-node": Name.DROP,
    b"x-cortex-cold-start": Name.DROP,
}


class _Names(dict[bytes, int]):
    """Spellings seen, with what they mean: each is lowered once. Bounded, as clients choose the spelling."""

    def __init__(self, known: dict[bytes, Name]) -> None:
        super().__init__()
        self._known = known

    def __missing__(self, name: bytes) -> int:
        meaning = int(self._known.get(name.lower(), Name.PASS))
        if len(self) < 4096:
            self[name] = meaning
        return meaning


_REQUEST_NAMES = _Names(_OF_REQUESTS)
_RESPONSE_NAMES = _Names(_OF_RESPONSES)


class RequestHeaders:
    """A request's headers: those that pass, joined, and those that mean something here."""

    __slots__ = (
        "api_key",
        "authorization",
        "chunked",
        "content_encoding",
        "content_length",
        "content_type",
        "cookie",
        "expects_continue",
        "forwarded_for",
        "passed",
        "request_id",
    )

    def __init__(self, head: RequestHead) -> None:
        """Raises BadHead where the headers contradict each other or ask for what is not done here."""
        self.content_length: int | None = None
        self.chunked = False
        self.content_type = b""
        self.content_encoding = b""
        self.authorization: bytes | None = None
        self.api_key: bytes | None = None
        self.cookie: bytes | None = None
        self.request_id: bytes | None = None
        self.forwarded_for: bytes | None = None
        self.expects_continue = False
        hosts = 0
        connection = b""
        passed: Headers = []
        names = _REQUEST_NAMES
        for header in head.headers:
            meaning = names[header[0]]
            if not meaning:
                passed.append(header)
            elif meaning == Name.CONTENT_TYPE:
                self.content_type = header[1]
                passed.append(header)
            elif meaning == Name.HOST:
                hosts += 1
            elif meaning == Name.CONNECTION:
                connection = connection + b"," + header[1] if connection else header[1]
            elif meaning != Name.DROP:
                self._take(meaning, header[1])
        self._check(head.version, hosts)
        self.passed = join(without_named(passed, connection))

    @property
    def credentials(self) -> bytes:
        """The header lines with which the client shows who it is: cortex's business, and none of an engine."""
        shown = ((b"authorization", self.authorization), (b"x-api-key", self.api_key), (b"cookie", self.cookie))
        return join([(name, value) for name, value in shown if value is not None])

    def _check(self, version: str, hosts: int) -> None:
        if version == "1.1" and hosts != 1:
            raise BadHead("a request has exactly one Host header")
        if self.chunked and (self.content_length is not None or version != "1.1"):
            raise BadHead("Transfer-Encoding does not go with Content-Length, nor with HTTP/1.0")

    def _take(self, meaning: int, value: bytes) -> None:
        if meaning == Name.CONTENT_LENGTH:
            if self.content_length is not None or not value.isdigit():
                raise BadHead("Content-Length must be one number")
            self.content_length = int(value)
        elif meaning == Name.AUTHORIZATION:
            self.authorization = value
        elif meaning == Name.API_KEY:
            self.api_key = value
        elif meaning == Name.COOKIE:
            self.cookie = value if self.cookie is None else self.cookie + b"; " + value
        elif meaning == Name.REQUEST_ID:
            self.request_id = value
        elif meaning == Name.FORWARDED_FOR:
            self.forwarded_for = value if self.forwarded_for is None else self.forwarded_for + b", " + value
        elif meaning == Name.TRANSFER_ENCODING:
            if self.chunked or value.lower() != b"chunked":
                raise BadHead("of the transfer encodings only 'chunked' is understood", 501)
            self.chunked = True
        elif meaning == Name.CONTENT_ENCODING:
            self.content_encoding = self.content_encoding + b"," + value if self.content_encoding else value
        elif meaning == Name.EXPECT:
            if value.lower() != b"100-continue":
                raise BadHead("of the expectations only '100-continue' is understood", 417)
            self.expects_continue = True


class ResponseHeaders:
    """A response's headers, likewise."""

    __slots__ = ("chunked", "compressed", "content_length", "event_stream", "passed")

    def __init__(self, head: ResponseHead) -> None:
        """Raises BadHead where the end of the body cannot be told safely."""
        self.content_length: int | None = None
        self.chunked: bool = False
        self.compressed = False
        self.event_stream = False
        connection = b""
        passed: Headers = []
        names = _RESPONSE_NAMES
        for header in head.headers:
            meaning = names[header[0]]
            if not meaning:
                passed.append(header)
            elif meaning == Name.CONTENT_TYPE:
                self.event_stream = header[1][:17].lower() == b"text/event-stream"
                passed.append(header)
            elif meaning == Name.CONTENT_LENGTH:
                if self.content_length is not None or not header[1].isdigit():
                    raise BadHead("Content-Length must be one number")
                self.content_length = int(header[1])
            elif meaning == Name.TRANSFER_ENCODING:
                if self.chunked or header[1].lower() != b"chunked":
                    raise BadHead(f"transfer encoding {header[1][:64]!r}")
                self.chunked = True
            elif meaning == Name.CONTENT_ENCODING:
                self.compressed = True
                passed.append(header)
            elif meaning == Name.CONNECTION:
                connection = connection + b"," + header[1] if connection else header[1]
        if self.chunked and self.content_length is not None:
            raise BadHead("both Content-Length and Transfer-Encoding")
        self.passed = join(without_named(passed, connection))


def without_named(headers: Headers, connection: bytes) -> Headers:
    """The headers that `Connection` does not name."""
    if not connection or connection.lower() in (b"keep-alive", b"close"):
        return headers
    named = {token.strip().lower() for token in connection.split(b",")}
    return [header for header in headers if header[0].lower() not in named]


def join(headers: Headers) -> bytes:
    """The header lines, each with its CRLF."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])
