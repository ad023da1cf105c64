"""A client's request, and the head that an engine gets for it. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote_to_bytes

from cortex.http import headers as names
from cortex.http.body_reader import BodyRest
from cortex.http.heads import BadHead, RequestHead
from shared.errors import shortened

_OFFERED_KEY: Final = b"openai-insecure-api-key."
_VERSIONS: Final = (b"HTTP/1.1", b"HTTP/1.0")
# Numbers: searching bytes for a number is seven times faster than for a bytes object.
_COMMA: Final = 0x2C
_PERCENT: Final = 0x25
_BLANK: Final = 0x20
_CONTROL: Final = re.compile(rb"[\x00-\x1f\x7f]")
_AUTHORITY: Final = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)


class Request:
    """The head and, once it has arrived, the body.

    `target` is path and query as received, without scheme and authority; `path` is unquoted and has no query.
    `content_length` is None for a chunked body; `modern`: HTTP/1.1. `anthropic`: cortex's own answers have
    Anthropic's shape. `cors`: header lines that let a web page read the answer, without the final CRLF. `rates`: header
    lines of the answer about limits, each after a CRLF.
    """

    __slots__ = (
        "_named",
        "_passed",
        "_untranslated",
        "anthropic",
        "body",
        "content_length",
        "content_type",
        "cors",
        "keep_alive",
        "method",
        "modern",
        "path",
        "peer",
        "rates",
        "received",
        "streamed",
        "target",
        "upgrading",
    )

    def __init__(self, head: RequestHead, *, peer: str, received: float) -> None:
        """`received` is monotonic seconds.

        Raises:
            BadHead: the head is well-formed but unsupported.
        """
        version, named = head.version, head.named
        if version not in _VERSIONS:
            raise BadHead(f"unsupported HTTP version {version.decode()}", 505)
        self._named = named
        self._passed = head.passed
        self._untranslated: tuple[bytes, bytes] | None = None
        self.method = head.method
        self.modern = modern = version == b"HTTP/1.1"
        self.keep_alive = head.keep_alive
        self.peer = peer
        self.received = received
        self.body = b""
        self.cors = b""
        self.rates = b""
        self.content_type = named.get(names.CONTENT_TYPE, b"")
        self.content_length = _content_length(named, modern=modern)
        if names.HOST not in named:
            if modern:
                raise BadHead("missing Host header")
        elif _COMMA in named[names.HOST]:
            raise BadHead("more than one Host header")
        target = head.target
        if target[:1] != b"/":
            target = _path_of(head)
        self.target = target
        self.upgrading = False
        self.streamed: BodyRest | None = None
        path = target.partition(b"?")[0]
        self.path = path if _PERCENT not in path else _unquoted(path)
        self.anthropic = self.path.startswith(b"/v1/messages")

    @property
    def raw_path(self) -> bytes:
        """The path as received."""
        return self.target.partition(b"?")[0]

    @property
    def shown(self) -> str:
        """Method and path for a message or a log line; a long path is shortened."""
        return f"{self.method.decode('latin-1')} {shortened(self.path.decode('latin-1'))}"

    def use_path(self, path: bytes) -> None:
        """Replaces the path, also for the engine. The query stays."""
        _, mark, query = self.target.partition(b"?")
        self.target = path + mark + query
        self.path = path

    def translate(self, target: bytes, body: bytes) -> None:
        """Sends this JSON body to another target of the engine, for an uncompressed answer. `path` stays: the client
        gets its answer in that path's dialect."""
        if self._untranslated is None:
            self._untranslated = self.target, self.body
        self.target, self.body = target, body
        self.content_type = b"application/json"
        self.refuse_encodings()

    def restore(self) -> None:
        """Undoes `translate`, but for the headers."""
        if self._untranslated is not None:
            self.target, self.body = self._untranslated

    def passed_value(self, name: bytes) -> bytes | None:
        """The value of the first header of this name (in lower case) that cortex does not read otherwise."""
        for line in self._passed:
            key, _, value = line.partition(b":")
            if key.lower() == name:
                return value.strip()
        return None

    @property
    def upgrade(self) -> bytes | None:
        """The protocols that the client would like to switch to."""
        return self._named.get(names.UPGRADE)

    @property
    def replayable(self) -> bool:
        """The request can be sent again."""
        return self.streamed is None or not self.streamed.passed_on

    @property
    def request_id(self) -> bytes | None:
        """The client's `x-request-id`, unchecked."""
        return self._named.get(names.REQUEST_ID)

    def notice_anthropic_client(self) -> None:
        """Sets `anthropic` for other paths that Anthropic's clients use: their requests have a version header."""
        self.anthropic = self.anthropic or self.passed_value(b"anthropic-version") is not None

    @property
    def host(self) -> bytes | None:
        return self._named.get(names.HOST)

    @property
    def origin(self) -> bytes | None:
        """The web origin of the page that sent the request, as its browser says."""
        return self._named.get(names.ORIGIN)

    @property
    def cookie(self) -> bytes | None:
        return self._named.get(names.COOKIE)

    def drop_cookie(self) -> None:
        """Goes on as if the client had sent none."""
        self._named.pop(names.COOKIE, None)

    @property
    def fetch_site(self) -> bytes | None:
        """The browser's Sec-Fetch-Site."""
        return self._named.get(names.FETCH_SITE)

    @property
    def passed(self) -> list[bytes]:
        """The header lines that go to the engine unchanged."""
        return self._passed

    @property
    def content_encoding(self) -> bytes | None:
        return self._named.get(names.CONTENT_ENCODING)

    @property
    def expects_continue(self) -> bool:
        """The client waits for `100 Continue` before it sends the body."""
        return names.EXPECT in self._named

    def check_expectation(self) -> None:
        """Raises BadHead for any expectation other than `100-continue`."""
        expected = self._named.get(names.EXPECT)
        if expected is not None and expected.lower() != b"100-continue":
            raise BadHead("unsupported expectation; only '100-continue' is supported", 417)

    @property
    def api_key(self) -> bytes | None:
        """The key from `Authorization: Bearer`, Anthropic's `x-api-key` or the protocol
        `openai-insecure-api-key.KEY` of a WebSocket; None without any."""
        given = self._named.get(names.AUTHORIZATION)
        if given is not None and (given[:7] == b"Bearer " or given[:7].lower() == b"bearer "):
            key = given[7:]
            return key if key and key[0] > _BLANK and key[-1] > _BLANK else key.strip() or None
        given = self._named.get(names.API_KEY)
        return self._take_offered_key() if given is None and names.UPGRADE in self._named else given

    def _take_offered_key(self) -> bytes | None:
        """The key that a browser offers as a protocol of a WebSocket, because it cannot set headers. Engines do not get
        it."""
        for place, line in enumerate(self._passed):
            name, _, value = line.partition(b":")
            if name.lower() != b"sec-websocket-protocol":
                continue
            offered = [part.strip() for part in value.split(b",")]
            keys = [part[len(_OFFERED_KEY) :] for part in offered if part.startswith(_OFFERED_KEY)]
            if keys:
                rest = [part for part in offered if not part.startswith(_OFFERED_KEY)]
                self._passed[place : place + 1] = [name + b": " + b", ".join(rest)] if rest else []
                self._named[names.API_KEY] = keys[0]
                return keys[0]
        return None

    @property
    def forwarded(self) -> bool:
        """A proxy says that it passes the request on for another host."""
        return names.FORWARDED_FOR in self._named or self.passed_value(b"forwarded") is not None

    @property
    def credentials(self) -> list[bytes]:
        """The header lines that identify the client, for the control app. Engines never get them."""
        shown = (
            (b"authorization: ", names.AUTHORIZATION),
            (b"x-api-key: ", names.API_KEY),
            (b"cookie: ", names.COOKIE),
        )
        return [name + self._named[kind] for name, kind in shown if kind in self._named]

    def head_for(self, host: bytes, prefix: bytes, request_id: bytes, credentials: Iterable[bytes]) -> bytes:
        """The request head for an engine at `host`, below the path `prefix`. `credentials` are header lines."""
        forwarded = self.peer.encode("ascii", "replace")
        given = self._named.get(names.FORWARDED_FOR)
        if given is not None:
            forwarded = b"%b, %b" % (given, forwarded)
        usual = self.streamed is None and not self.upgrading
        framing = b"content-length: %d" % len(self.body) if usual else self._framing_line()
        lines = [
            b"%b %b%b HTTP/1.1" % (self.method, prefix, self.target),
            b"host: " + host,
            *self._passed,
            framing,
            b"x-request-id: " + request_id,
            b"x-forwarded-for: " + forwarded,
            *credentials,
        ]
        if self.content_type:
            lines.append(b"content-type: " + self.content_type)
        lines += (b"", b"")
        return b"\r\n".join(lines)

    def _framing_line(self) -> bytes:
        streamed = self.streamed
        if streamed is not None:
            left = streamed.left
            return b"transfer-encoding: chunked" if left is None else b"content-length: %d" % (len(self.body) + left)
        return b"connection: Upgrade\r\nupgrade: websocket"

    def drop_header(self, name: bytes) -> None:
        """Does not pass on the headers of this name (in lower case) that cortex does not read otherwise."""
        start = name + b":"
        self._passed = [line for line in self._passed if line[: len(start)].lower() != start]

    def refuse_encodings(self) -> None:
        """Asks the engine for an uncompressed answer."""
        self.drop_header(b"accept-encoding")
        self._passed.append(b"accept-encoding: identity")

    def discard(self) -> None:
        """The request has ended: frees what its body takes outside of memory."""
        if self.streamed is not None:
            self.streamed.discard()

    def forget(self) -> None:
        """Frees body and headers. The request cannot be sent again afterwards."""
        self.body = b""
        self._untranslated = None
        self._passed = []
        self._named = {}


def _content_length(named: dict[int, bytes], *, modern: bool) -> int | None:
    """The body's length, 0 without a body, None for a chunked one."""
    encoding, length = named.get(names.TRANSFER_ENCODING), named.get(names.CONTENT_LENGTH)
    if encoding is None:
        if length is None:
            return 0
        if not length.isdigit():
            raise BadHead("Content-Length must be a single number")
        return int(length)
    if encoding.lower() != b"chunked":
        raise BadHead("unsupported transfer encoding; only 'chunked' is supported", 501)
    if length is not None or not modern:
        raise BadHead("Transfer-Encoding cannot be combined with Content-Length or HTTP/1.0")
    return None


def _unquoted(path: bytes) -> bytes:
    """The path without percent-encoding. It stays as it is with an encoded slash, which is part of a segment and not a
    separator, or an encoded control character, which must not reach the log."""
    if b"%2f" in path.lower():
        return path
    unquoted = unquote_to_bytes(path)
    return path if _CONTROL.search(unquoted) else unquoted


def _path_of(head: RequestHead) -> bytes:
    """Path and query of a target in absolute form; `*` of OPTIONS."""
    target = head.target
    match = _AUTHORITY.match(target)
    if match is not None:  # the absolute form
        rest = target[match.end() :]
        return rest if rest[:1] == b"/" else b"/" + rest
    if target == b"*" and head.method == b"OPTIONS":
        return target
    raise BadHead(f"invalid request target: {target[:64]!r}")
