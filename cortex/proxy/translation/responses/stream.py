"""The events of a response, from a stream of chat completions. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cortex.proxy.answers.error_event import failure_code
from cortex.proxy.translation.chat_answer import choice_of, finish_reason_of
from cortex.proxy.translation.chat_stream import ChatEvent, ChatStreamReader
from cortex.proxy.translation.interface import Json, event
from cortex.proxy.translation.responses.output import OutputEvent
from cortex.proxy.translation.responses.response import (
    FAILED,
    IN_PROGRESS,
    TranslatedResponse,
)
from shared.errors import UpstreamError
from shared.protocol import ErrorCode


class ResponseStream:
    """Implements `interface.StreamTranslation`. The first call returns `response.created`, whatever has come."""

    def __init__(self, response: TranslatedResponse) -> None:
        self._response = response
        self._reader = ChatStreamReader()
        self._number = 0
        self._has_chunks = False
        self._ended = False

    def feed(self, data: bytes) -> bytes:
        return self._written(self._take_all(self._reader.feed(data)))

    def finish(self) -> bytes:
        def rest() -> Iterator[OutputEvent]:
            yield from self._take_all(self._reader.finish())
            yield from self._end()

        return self._written(rest())

    def _written(self, events: Iterable[OutputEvent]) -> bytes:
        if not self._number:
            events = [*self._start(), *events]
        written = []
        for kind, fields in events:
            name = f"response.{kind}"
            # The number comes last: `answers.error_event` reads it from the end of what was sent.
            written.append(event(name, {"type": name, **fields, "sequence_number": self._number}))
            self._number += 1
        return b"".join(written)

    def _start(self) -> Iterator[OutputEvent]:
        yield "created", {"response": self._response.view(IN_PROGRESS)}
        yield "in_progress", {"response": self._response.view(IN_PROGRESS)}

    def _take_all(self, events: Iterable[ChatEvent]) -> Iterator[OutputEvent]:
        for found in events:
            if self._ended:
                return
            if found.kind == "chunk":
                yield from self._take(found.data)
            elif found.kind == "error":
                yield from self._fail(found.message, found.data.get("error"))
            else:
                self._response.ended = self._has_chunks
                yield from self._end()

    def _take(self, chunk: Json) -> Iterator[OutputEvent]:
        response = self._response
        response.note(chunk)
        choice = choice_of(chunk)
        if choice is not None:
            self._has_chunks = True
            yield from response.output.take(choice)
            response.finish_reason = finish_reason_of(choice) or response.finish_reason

    def _end(self) -> Iterator[OutputEvent]:
        """`usage` comes after the finish reason, so the end of the stream is the end of the response."""
        if self._ended:
            return
        status = self._response.status
        failure = self._response.failure()
        if failure is not None:
            yield from self._fail(failure, None)
            return
        self._ended = True
        yield from self._response.output.close(status)
        yield status, {"response": self._response.view(status)}

    def _fail(self, message: str, given: object) -> Iterator[OutputEvent]:
        """`error` beside the response makes the openai packages raise; Codex reads the one in the response."""
        self._ended = True
        error = UpstreamError(message, code=ErrorCode.UPSTREAM_ERROR).body()["error"]
        if isinstance(given, dict):
            error |= given
        self._response.output.abandon()  # without events: Codex runs a call whose item is done
        failed = self._response.view(FAILED, {"code": failure_code(error), "message": message})
        yield FAILED, {"response": failed, "error": error}
