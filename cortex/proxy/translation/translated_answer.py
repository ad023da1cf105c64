"""Gives the client an engine's answer in the client's dialect."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from cortex.http import headers as names
from cortex.http.event_stream import is_event_stream
from cortex.http.framing import ChunkedBody, SizedBody
from cortex.http.heads import ResponseHead
from cortex.proxy.answers.answer import Answer
from cortex.proxy.answers.held_answer import HeldAnswer
from cortex.proxy.translation.chat_answer import as_stream
from cortex.proxy.translation.interface import StreamTranslation, Translation
from cortex.proxy.translation.lacking import lacks_path
from cortex.upstream.connection import Body
from shared.errors import ServiceError

MAX_WHOLE_BYTES: Final = 64 << 20
"""Of an answer that is not a stream: it is collected before it is translated."""

_EVENTS: Final = b"text/event-stream; charset=utf-8"
_JSON: Final = b"application/json"
_UNTYPED: Final = (b"", b"text/plain", b"application/octet-stream")
"""What servers call a stream that was given no type."""
_ZLIB: Final = (b"gzip", b"x-gzip", b"deflate")
_GZIP_OR_ZLIB: Final = zlib.MAX_WBITS | 32


class TranslatedAnswer(Answer):
    """`inner` gets what an engine that speaks the dialect would have sent, in chunks of our own."""

    __slots__ = ("_collected", "_framing", "_held", "_inner", "_size", "_stream", "_translation", "_unzip", "head")

    def __init__(self, inner: Answer, translation: Translation, held: HeldAnswer | None) -> None:
        """`held`: what the engine answered to the client's own request. The client gets that if the engine lacks chat
        completions too, as those of embedding models do."""
        super().__init__(inner.client, inner.request)
        self.tail = inner.tail
        self._inner = inner
        self._translation = translation
        self._held = held
        self._stream: StreamTranslation | None = None
        self._framing = ChunkedBody()
        self._collected: list[bytes] = []
        self._size = 0
        self._unzip: Callable[[bytes], bytes] | None = None
        self.head: ResponseHead

    def begin(self, head: ResponseHead, body: Body, first: bytes) -> bool:
        self.head = head
        self.body = body
        if isinstance(body, ChunkedBody):
            first = body.start_unpacking(first)
            self.unpacked = body
        encoding = head.named.get(names.CONTENT_ENCODING, b"identity").strip().lower()
        if encoding in _ZLIB:
            self._unzip = zlib.decompressobj(_GZIP_OR_ZLIB).decompress
        first = self._plain(first)
        readable = encoding == b"identity" or self._unzip is not None
        stream = self._translation.stream() if readable and _may_stream(head) else None
        if stream is not None:
            self._begin_stream(stream, first)
        else:
            self._collect(first)
        return False

    def write(self, data: bytes) -> None:
        if self.unpacked is not None:
            data = self.unpacked.take()
        data = self._plain(data)
        if self._stream is None:
            self._collect(data)
        else:
            events = self._framed(self._stream.feed(data))
            if events:
                self._inner.write(events)

    def finish(self, status: int) -> int:
        if self._stream is not None:
            return self._finish_stream(self._stream, status)
        body = b"".join(self._collected)
        stream = self._translation.stream() if status == 200 else None
        events = None if stream is None else as_stream(body)
        if stream is not None and events is not None:  # the engine ignores `stream`
            self._begin_stream(stream, events)
            return self._finish_stream(stream, status)
        if self._held is not None and status in (404, 405) and lacks_path(status, body):
            return self._held.pass_to(self._inner)
        status, body = self._translation.answer(status, body)
        named = {names.CONTENT_TYPE: _JSON, names.CONTENT_LENGTH: b"%d" % len(body)}
        framing = SizedBody(len(body))
        self._inner.begin(_head_of(self.head, status, named), framing, framing.feed(body))
        return self._inner.finish(status)

    def lose(self, error: ServiceError, model: str) -> None:
        self._inner.lose(error, model)

    def break_silence(self, text: str) -> None:
        self._inner.break_silence(text)

    def refusal(self) -> bytes:
        return self._inner.refusal()

    def _plain(self, data: bytes) -> bytes:
        """`data` as the engine compressed it, although it was asked not to. What cannot be read is dropped: then the
        answer is not complete, and the client learns that."""
        if self._unzip is None:
            return data
        try:
            return self._unzip(data)
        except zlib.error:
            return b""

    def _begin_stream(self, stream: StreamTranslation, first: bytes) -> None:
        """Begins the client's stream with the events for the first bytes of the engine's."""
        self._stream = stream
        head = _head_of(self.head, self.head.status, {names.CONTENT_TYPE: _EVENTS})
        self._inner.begin(head, self._framing, self._framed(stream.feed(first)))
        self.events, self.in_chunks = self._inner.events, self._inner.in_chunks

    def _finish_stream(self, stream: StreamTranslation, status: int) -> int:
        self._inner.write(self._framed(stream.finish()) + self._framing.feed(b"0\r\n\r\n"))
        return self._inner.finish(status)

    def _framed(self, events: bytes) -> bytes:
        return self._framing.feed(b"%x\r\n%b\r\n" % (len(events), events)) if events else b""

    def _collect(self, data: bytes) -> None:
        """What exceeds the limit is dropped; then the rest is not valid JSON."""
        self._collected.append(data[: MAX_WHOLE_BYTES - self._size])
        self._size += len(self._collected[-1])


def _may_stream(head: ResponseHead) -> bool:
    """True for an event stream, also without its content type."""
    content_type = head.named.get(names.CONTENT_TYPE, b"")
    kind = content_type.partition(b";")[0].strip().lower()
    return head.status == 200 and (is_event_stream(content_type) or kind in _UNTYPED)


def _head_of(head: ResponseHead, status: int, named: dict[int, bytes]) -> ResponseHead:
    """The engine's head with another status and other headers for its body."""
    translated = ResponseHead()
    translated.version = head.version
    translated.keep_alive = head.keep_alive
    translated.status = status
    translated.reason = head.reason if status == head.status else HTTPStatus(status).phrase.encode()
    translated.passed = head.passed
    translated.named = named
    return translated
