"""Writes an engine's answer to the client. Subclass `Answer` for another form; the relay needs no change."""

from __future__ import annotations

from typing import Final

from cortex.http import headers as names
from cortex.http.connection import ClientConnection
from cortex.http.event_stream import EVENT_STREAM_LINES, ends_event, is_event_stream, sign_of_life
from cortex.http.framing import BodyUntilClose, ChunkedBody, SizedBody
from cortex.http.heads import ResponseHead
from cortex.http.request import Request
from cortex.proxy.answers.error_event import error_event
from cortex.upstream.connection import Body
from cortex.upstream.tail import UsageTail
from cortex.upstream.usage import Usage
from shared.errors import ServiceError, is_anthropic_path

STRAIGHT_END: Final = b"\r\n"
"""How every whole chunk ends."""
NEVER_STRAIGHT: Final = b"\n\n"
"""No chunk ends like this."""


class Answer:
    """The client's side of one relay. The relay calls `begin` once, then `write` for each further piece of the body,
    and one of `finish` and `lose` at the end.

    `events`: the answer is an event stream, into which events of ours can be written, `in_chunks`: as chunks. `tail`
    must be fed with each byte of the engine's body that goes to the client. `straight_end`: of an answer whose chunks
    pass as they are, whole ones with this end do not need `write` either.
    """

    __slots__ = ("body", "client", "events", "in_chunks", "request", "straight_end", "tail", "unpacked")

    def __init__(self, client: ClientConnection, request: Request) -> None:
        self.client = client
        self.request = request
        self.tail = UsageTail()
        self.events = False
        self.in_chunks = False
        self.straight_end = STRAIGHT_END
        self.body: Body | None = None
        self.unpacked: ChunkedBody | None = None  # the body, if the client does not get its chunks

    def begin(self, head: ResponseHead, body: Body, first: bytes) -> bool:
        """Writes the head and the first bytes of the body. True if the engine's chunks can pass to the client as they
        are; then `write` is called for partial chunks only."""
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        """Writes further bytes of the body, framed as the engine sent them."""
        if self.unpacked is not None:
            data = self.unpacked.take()
        self.tail.feed(data)
        self.client.transport.write(data)

    def finish(self, status: int) -> int:
        """Ends an answer that arrived completely with the engine's `status`. Returns the status to log."""
        return status

    def lose(self, error: ServiceError, model: str) -> None:
        """Ends an answer whose engine was lost. It must not look complete: an event stream gets `error` as its last
        event, any other answer a reset connection. `model` is what the engine was asked for."""
        last = self.lost_event(error, model) if self.events else None
        if last is not None and not self.between_events:
            last = b"\n\n" + last  # ends the event that was cut off
        if last is not None and isinstance(self.body, ChunkedBody) and self.unpacked is None:
            last = self.body.cut_off(last)
        if last is None:
            self.request.keep_alive = False
            self.client.cut()
        else:
            self.client.transport.write(last)

    def usage(self) -> Usage | None:
        """What the engine has counted, if it says so."""
        return self.tail.usage()

    @property
    def can_follow(self) -> bool:
        """An event stream that `KeepAliveStream` frames can follow the head that this answer has sent."""
        return self.events and (self.in_chunks or not self.request.modern)

    @property
    def contents_start(self) -> bytes:
        """The first bytes of the body, at least 512 of a longer one less the framing of chunks."""
        start = self.tail.start
        if self.unpacked is None and isinstance(self.body, ChunkedBody):
            return ChunkedBody().start_unpacking(start)
        return start

    @property
    def between_events(self) -> bool:
        """An event of ours can follow what the client has of an event stream."""
        body, straight = self.body, self.unpacked is None and isinstance(self.body, ChunkedBody)
        if straight:
            assert isinstance(body, ChunkedBody)
            if not body.at_chunk_end:
                return False
        return ends_event(self.tail.end, in_chunks=straight)

    def break_silence(self, text: str) -> None:
        """Sends a comment with `text` where one may stand, unless the client does not read."""
        transport = self.client.transport
        if self.events and not transport.get_write_buffer_size() and self.between_events:
            sign = sign_of_life(text, ping=is_anthropic_path(self.request.path))
            transport.write(b"%x\r\n%b\r\n" % (len(sign), sign) if self.in_chunks else sign)

    def refusal(self) -> bytes:
        """The end of an engine's error."""
        return b"".join(self.tail.chunks)

    def lost_event(self, error: ServiceError, model: str) -> bytes:
        """The last event of a stream whose engine was lost."""
        return error_event(
            self.request.path, error, start=self.contents_start, end=b"".join(self.tail.chunks), model=model
        )


def own_lines(request: Request, request_id: bytes) -> bytes:
    """The header lines that cortex adds to every answer, without the final CRLF."""
    lines = b"x-request-id: " + request_id + request.rates
    if request.anthropic:  # Anthropic's clients read this one
        lines += b"\r\nrequest-id: " + request_id
    return lines + b"\r\n" + request.cors if request.cors else lines


class DirectAnswer(Answer):
    """The usual form: the engine's head without hop-by-hop headers, then the engine's bytes."""

    __slots__ = ("extra",)

    def __init__(self, client: ClientConnection, request: Request, *, extra: bytes) -> None:
        """`extra`: header lines that cortex adds, without the final CRLF."""
        super().__init__(client, request)
        self.extra = extra

    def begin(self, head: ResponseHead, body: Body, first: bytes) -> bool:
        client, request, named = self.client, self.request, head.named
        self.body = body
        lines = [b"HTTP/1.1 %d %b" % (head.status, head.reason), *head.passed, self.extra]
        content_type = named.get(names.CONTENT_TYPE)
        stream = False
        if content_type is not None:
            lines.append(b"content-type: " + content_type)
            stream = is_event_stream(content_type)
        encoding = named.get(names.CONTENT_ENCODING)
        if encoding is not None:
            lines.append(b"content-encoding: " + encoding)
        if stream:
            lines.append(EVENT_STREAM_LINES)
        elif names.CACHE_CONTROL in named or names.ACCEL_BUFFERING in named:
            lines += _for_caches(named)
        keep_alive = request.keep_alive and not client.draining
        straight = False
        if isinstance(body, SizedBody):
            if names.CONTENT_LENGTH in named:
                lines.append(b"content-length: " + named[names.CONTENT_LENGTH])
        else:
            self.events = stream and encoding is None
            if isinstance(body, BodyUntilClose):
                keep_alive = False
            elif request.modern:
                lines.append(b"transfer-encoding: chunked")
                straight = self.in_chunks = True
            else:
                first = body.start_unpacking(first)
                self.unpacked = body
                keep_alive = False
        request.keep_alive = keep_alive
        if not keep_alive:
            lines.append(b"connection: close")
        elif not request.modern:
            lines.append(b"connection: keep-alive")
        lines += (b"", first)
        self.tail.feed(first)
        client.transport.write(b"\r\n".join(lines))
        return straight


def _for_caches(named: dict[int, bytes]) -> list[bytes]:
    """The engine's header lines for caches and proxies."""
    found = (
        (b"cache-control: ", named.get(names.CACHE_CONTROL)),
        (b"x-accel-buffering: ", named.get(names.ACCEL_BUFFERING)),
    )
    return [name + value for name, value in found if value is not None]
